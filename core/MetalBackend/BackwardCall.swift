import CPUBackend
import MFACore
import Metal

// The struct of attention_backward.metal, field by field.
private struct BackwardParameters {
    var attention: AttentionParameters
    var gradOutput: TensorView
    var gradQuery = TensorView(strides: (0, 0, 0, 0))
    var gradKey = TensorView(strides: (0, 0, 0, 0))
    var gradValue = TensorView(strides: (0, 0, 0, 0))
    var gradMaskStrides: Long4 = (0, 0, 0, 0)
}

/// One backward problem as the device gets it, and the kernels that compute it, one after the other.
struct BackwardCall: DeviceCall {
    private let arguments: AttentionArguments
    private let parameters: BackwardParameters
    private let bindings: Bindings
    private let results: DeviceResults
    private let steps: [Step]
    /// Undo the rotation of gradients.
    private let rotations: [QuantizePass]

    private struct Step {
        let pipeline: any MTLComputePipelineState
        let groups: MTLSize
        let threads: Int
    }

    /// The number of rows and columns that a threadgroup owns.
    private static let tile = 32

    /// The kernel for gradients of queries, or of keys and values, that serves a problem.
    static func kernelName(_ problem: AttentionProblem, _ operation: Operation) -> StaticString? {
        guard let channels = AttentionKernels.channels(problem) else { return nil }
        switch (operation, channels) {
        case (.forward, _): return nil
        case (.backwardQuery, 32): return "attention_backward_query_metal_32"
        case (.backwardQuery, 64): return "attention_backward_query_metal_64"
        case (.backwardQuery, _): return "attention_backward_query_metal_128"
        case (.backwardKeyValue, 32): return "attention_backward_key_value_metal_32"
        case (.backwardKeyValue, 64): return "attention_backward_key_value_metal_64"
        case (.backwardKeyValue, _): return "attention_backward_key_value_metal_128"
        }
    }

    /// Whether there are kernels for a problem.
    static func serves(_ problem: BackwardProblem) -> Bool {
        let gradients = problem.gradients
        let tensors = [gradients.gradOutput, gradients.gradQuery, gradients.gradKey, gradients.gradValue, gradients.gradMask]
        if tensors.contains(where: { $0?.precision == .fp64 }) { return false }
        return AttentionKernels.channels(problem.attention) != nil
    }

    /// Takes all memory that the call needs, and reads the operands that have to be copied. The problem has query rows, and `serves` is true.
    /// Of a deferred call no operand has to be copied, and nothing is read.
    init(
        _ problem: BackwardProblem, _ memory: DeviceMemory, _ library: inout KernelLibrary, isDeferred: Bool = false
    ) throws(MFAError) {
        let attention = problem.attention
        let gradients = problem.gradients
        var results = DeviceResults()
        let arguments = try AttentionArguments(attention, memory, &library, isDeferred: isDeferred)
        var bindings = arguments.bindings
        let statistics = attention.rowCount * MemoryLayout<Float>.size
        let byHead = attention.numHeads * MemoryLayout<Float>.size

        let (gradOutput, gradOutputStrides) = try memory.share(gradients.gradOutput)
        bindings[17] = gradOutput
        var parameters = BackwardParameters(
            attention: arguments.parameters, gradOutput: TensorView(strides: long4(gradOutputStrides)))
        bindings[6] = try memory.share(attention.logsumexp, size: statistics)
        if let gradLogsumexp = gradients.gradLogsumexp { bindings[18] = try memory.share(gradLogsumexp, size: statistics) }

        // Integer kernels round the weights of their output: what it would give for d_values is too far off.
        let kernelOptions = AttentionKernelOptions(attention, isDeferred: isDeferred)
        var source = BackwardCall.recomputed
        if gradients.dValuesGiven {
            source = BackwardCall.given
            bindings[19] = try memory.share(gradients.dValues, size: statistics)
        } else {
            if let output = attention.output, output.hasElements, !kernelOptions.hasCodes {
                source = BackwardCall.fromOutput
                let (address, strides) = try memory.share(output)
                bindings[5] = address
                parameters.attention.output = TensorView(strides: long4(strides))
            }
            if let dValues = gradients.dValues {
                bindings[19] = try results.add(dValues, size: statistics, memory)
            } else {
                bindings[19] = DeviceAddress(buffer: try memory.make(statistics), offset: 0)
            }
        }

        // Gradients of rotated codes come in the rotated space, in FP32.
        var rotations: [QuantizePass] = []
        func add(_ gradient: Tensor, isRotated: Bool, _ results: inout DeviceResults) throws(MFAError) -> (DeviceAddress, TensorView) {
            let (target, view) = try results.add(gradient, memory)
            if !isRotated { return (target, view) }
            let shape = gradient.shape
            let rotated = Tensor(nil, precision: .fp32, shape: shape)
            let size = shape[0] * shape[1] * shape[2] * shape[3] * MemoryLayout<Float>.size
            let source = DeviceAddress(buffer: try memory.make(size), offset: 0)
            let sourceView = TensorView(strides: long4(rotated.strides))
            var bindings = Bindings()
            bindings[2] = source
            rotations.append(
                try QuantizePass(rotated, rotated: true, bindings, sourceView, to: target, view, gradient.precision, &library))
            return (source, sourceView)
        }
        let rotatesQuery = attention.options.quantizeQuery?.rotate ?? attention.query.quantization?.rotated ?? false
        let rotatesKey = attention.options.quantizeKey?.rotate ?? attention.key.quantization?.rotated ?? false
        if let gradient = gradients.gradQuery {
            (bindings[20], parameters.gradQuery) = try add(gradient, isRotated: rotatesQuery, &results)
        }
        if let gradient = gradients.gradKey {
            (bindings[22], parameters.gradKey) = try add(gradient, isRotated: rotatesKey, &results)
        }
        if let gradient = gradients.gradValue { (bindings[23], parameters.gradValue) = try results.add(gradient, memory) }
        if let gradient = gradients.gradMask {
            let (address, view) = try results.add(gradient, memory)
            bindings[24] = address
            parameters.gradMaskStrides = view.strides
        }
        if let gradient = gradients.gradSinks { bindings[25] = try results.add(gradient, size: byHead, memory) }
        if let gradient = gradients.gradAlibiSlopes {
            bindings[21] = DeviceAddress(buffer: try memory.make(statistics), offset: 0)
            bindings[26] = try results.add(gradient, size: byHead, memory)
        }

        self.arguments = arguments
        self.rotations = rotations
        self.parameters = parameters
        self.bindings = bindings
        self.results = results
        steps = try BackwardCall.steps(problem, kernelOptions.constants, parameters, source, rotatesQuery, rotatesKey, &library)
    }

    // The numbers of attention_backward.metal.
    private static let given: Int32 = 0
    private static let fromOutput: Int32 = 1
    private static let recomputed: Int32 = 2

    private static func steps(
        _ problem: BackwardProblem, _ attentionConstants: KernelConstants, _ parameters: BackwardParameters, _ source: Int32,
        _ rotatesQuery: Bool, _ rotatesKey: Bool, _ library: inout KernelLibrary
    ) throws(MFAError) -> [Step] {
        let attention = problem.attention
        let gradients = problem.gradients
        guard let channels = AttentionKernels.channels(attention) else { return [] }
        var constants = attentionConstants
        constants.set(gradients.gradOutput.precision.rawValue, 13)
        func type(_ gradient: Tensor?, isRotated: Bool = false) -> Int32 {
            guard let gradient else { return -1 }
            return (isRotated ? .fp32 : gradient.precision).rawValue
        }
        constants.set(type(gradients.gradQuery, isRotated: rotatesQuery), 14)
        constants.set(type(gradients.gradKey, isRotated: rotatesKey), 15)
        constants.set(type(gradients.gradValue), 16)
        constants.set(type(gradients.gradMask), 17)
        constants.set(source, 18)
        constants.set(gradients.gradLogsumexp != nil, 19)
        constants.set(gradients.gradAlibiSlopes != nil, 20)
        constants.set(gradients.gradSinks != nil, 21)

        var steps: [Step] = []
        func add(_ name: String, _ groups: (Int, Int, Int), threads: Int = 128) throws(MFAError) {
            let pipeline = try library.pipeline(name, of: .attentionBackward, constants)
            steps.append(Step(pipeline: pipeline, groups: MTLSize(width: groups.0, height: groups.1, depth: groups.2), threads: threads))
        }
        func tiles(_ count: Int) -> Int { (count + tile - 1) / tile }

        let channelBlocks = (attention.headDim + channels - 1) / channels
        let valueBlocks = (attention.headDimV + channels - 1) / channels
        if source != given || gradients.gradQuery != nil || gradients.gradAlibiSlopes != nil,
            let name = kernelName(attention, .backwardQuery)
        {
            try add("\(name)", (tiles(attention.seqLenQ), attention.numHeads * channelBlocks, attention.batchSize))
        }
        if gradients.gradKey != nil || gradients.gradValue != nil, let name = kernelName(attention, .backwardKeyValue) {
            let blocks = max(channelBlocks, valueBlocks)
            try add("\(name)", (tiles(attention.seqLenKV), attention.numKVHeads * blocks, attention.batchSize))
        }
        if gradients.gradMask != nil {
            let strides = parameters.gradMaskStrides
            let rows = strides.2 != 0 ? tiles(attention.seqLenQ) : 1
            let columns = strides.3 != 0 ? tiles(attention.seqLenKV) : 1
            let heads = (strides.0 != 0 ? attention.batchSize : 1) * (strides.1 != 0 ? attention.numHeads : 1)
            try add("attention_backward_mask_metal", (columns, rows, heads))
        }
        if gradients.gradSinks != nil || gradients.gradAlibiSlopes != nil {
            try add("attention_backward_heads_metal", (attention.numHeads, 1, 1), threads: 32)
        }
        return steps
    }

    func encode(_ encoder: any MTLComputeCommandEncoder) {
        arguments.encodePasses(encoder)
        encoder.setParameters(parameters, index: 0)
        bindings.set(encoder)
        for step in steps {
            encoder.setComputePipelineState(step.pipeline)
            encoder.dispatchThreadgroups(step.groups, threadsPerThreadgroup: MTLSize(width: step.threads, height: 1, depth: 1))
        }
        for rotation in rotations { rotation.encode(encoder) }
    }

    func finish(_ cpu: CPUBackend) throws(MFAError) {
        try arguments.checkPasses()
        results.copy()
    }
}
