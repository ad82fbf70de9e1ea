import CPUBackend
import MFACore
import Metal

/// One forward problem as the device gets it: everything it reads and writes lies in buffers of its own or that it shares with the host.
struct AttentionCall: DeviceCall {
    private let problem: AttentionProblem
    private let steps: [Step]
    private let memory: DeviceMemory
    private let arguments: AttentionArguments
    private let results: DeviceResults

    private struct Step {
        let pipeline: any MTLComputePipelineState
        let groups: MTLSize
    }

    /// Takes all memory that the call needs, and reads the operands that have to be copied. If the call is deferred none have, by
    /// `checkLocations`, and nothing is read.
    init(
        _ problem: AttentionProblem, _ kernel: AttentionKernel, _ memory: DeviceMemory, _ library: inout KernelLibrary,
        isDeferred: Bool = false
    ) throws(MFAError) {
        guard let output = problem.output else { throw .argument("`output` must not be NULL") }
        self.problem = problem
        self.memory = memory
        var arguments = try AttentionArguments(problem, memory, &library, isDeferred: isDeferred)
        var results = DeviceResults()
        (arguments.bindings[5], arguments.parameters.output) = try results.add(output, memory)
        if let logsumexp = problem.logsumexp {
            arguments.bindings[6] = try results.add(logsumexp, size: problem.rowCount * MemoryLayout<Float>.size, memory)
        }
        let constants = AttentionKernelOptions(problem, isDeferred: isDeferred).constants
        if let packedRows = kernel.packedRows {
            steps = try AttentionCall.decode(problem, kernel, packedRows, constants, memory, &library, &arguments.bindings)
        } else {
            let pipeline = try library.pipeline("\(kernel.name)", of: .attentionForward, constants)
            let blocks = AttentionCall.count(problem.headDimV, by: kernel.channels)
            let tiles = AttentionCall.count(problem.seqLenQ, by: 32)
            steps = [Step(pipeline: pipeline, groups: MTLSize(width: tiles, height: problem.numHeads * blocks, depth: problem.batchSize))]
        }
        self.arguments = arguments
        self.results = results
    }

    private static func count(_ size: Int, by unit: Int) -> Int { (size + unit - 1) / unit }

    // The numbers of attention_decode.metal: the columns of a part, and the parts of a threadgroup.
    private static let partColumns = 128
    private static let partsTogether = 4

    /// The two passes of attention over parts of the columns, and memory for what the first leaves to the second.
    private static func decode(
        _ problem: AttentionProblem, _ kernel: AttentionKernel, _ packedRows: Int, _ constants: KernelConstants, _ memory: DeviceMemory,
        _ library: inout KernelLibrary, _ bindings: inout Bindings
    ) throws(MFAError) -> [Step] {
        let parts = count(problem.seqLenKV, by: partColumns)
        let elements = max(problem.rowCount * parts, 1)
        let statistics = 2 * MemoryLayout<Float>.size
        bindings[28] = DeviceAddress(buffer: try memory.make(elements * problem.headDimV * MemoryLayout<Float>.size), offset: 0)
        bindings[29] = DeviceAddress(buffer: try memory.make(elements * statistics), offset: 0)
        var steps: [Step] = []
        if parts > 0 {
            let pipeline = try library.pipeline("\(kernel.name)", of: .attentionDecode, constants)
            let packs = count(problem.numHeads / problem.numKVHeads * problem.seqLenQ, by: packedRows)
            let groups = MTLSize(width: count(parts, by: partsTogether), height: problem.numKVHeads * packs, depth: problem.batchSize)
            steps.append(Step(pipeline: pipeline, groups: groups))
        }
        let merge = try library.pipeline("attention_decode_merge_metal", of: .attentionDecode, constants)
        steps.append(Step(pipeline: merge, groups: MTLSize(width: problem.seqLenQ, height: problem.numHeads, depth: problem.batchSize)))
        return steps
    }

    /// Binds everything and dispatches the kernels.
    func encode(_ encoder: any MTLComputeCommandEncoder) {
        arguments.encodePasses(encoder)
        encoder.setParameters(arguments.parameters, index: 0)
        arguments.bindings.set(encoder)
        for step in steps {
            encoder.setComputePipelineState(step.pipeline)
            encoder.dispatchThreadgroups(step.groups, threadsPerThreadgroup: MTLSize(width: 128, height: 1, depth: 1))
        }
    }

    /// Gives the caller the results, those of some rows computed by the CPU.
    func finish(_ cpu: CPUBackend) throws(MFAError) {
        try arguments.checkPasses()
        results.copy()
        if !arguments.needsCare { return }
        do throws(MFAError) {
            try computeAnew(cpu)
        } catch {
            // Too late for another status: results are written.
            throw MFAError(.executionFailed, error.message)
        }
    }

    /// Has the CPU compute the call in memory of its own, and takes over the rows for which float is too narrow. All others keep their bits.
    private func computeAnew(_ cpu: CPUBackend) throws(MFAError) {
        guard let output = problem.output, let address = output.address else { return }
        let shape = output.shape
        let unit = output.precision.unitSize
        let buffers = (try memory.make(problem.rowCount * shape[3] * unit), try memory.make(problem.rowCount * MemoryLayout<Float>.size))
        defer { withExtendedLifetime(buffers) {} }
        let data = buffers.0.contents()
        let statistics = buffers.1.contents()
        let anew = Tensor(data, precision: output.precision, shape: shape)
        try cpu.forward(problem.writing(output: anew, logsumexp: problem.logsumexp == nil ? nil : statistics))
        for batch in 0..<shape[0] {
            for head in 0..<shape[1] {
                for row in 0..<shape[2] {
                    let statistic = (batch * shape[1] + head) * shape[2] + row
                    if !arguments.needsCare(statistic) { continue }
                    let target = batch * output.strides[0] + head * output.strides[1] + row * output.strides[2]
                    for channel in 0..<shape[3] {
                        let from = data + (statistic * shape[3] + channel) * unit
                        (address + (target + channel * output.strides[3]) * unit).copyMemory(from: from, byteCount: unit)
                    }
                    let offset = statistic * MemoryLayout<Float>.size
                    problem.logsumexp.map { $0 + offset }?.copyMemory(from: statistics + offset, byteCount: MemoryLayout<Float>.size)
                }
            }
        }
    }
}
