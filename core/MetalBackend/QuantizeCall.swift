import CPUBackend
import MFACore
import Metal

// The struct of quantize.metal, field by field.
private struct QuantizeParameters {
    var input: TensorView
    var output: TensorView
    var numHeads: Int32
    var seqLen: Int32
    var headDim: Int32
    var rotation: Int32
    var rotationFactor: Float
    var heedsRefusal: Int32

    init(_ input: TensorView, _ output: TensorView, _ shape: Shape) {
        self.input = input
        self.output = output
        numHeads = Int32(shape[1])
        seqLen = Int32(shape[2])
        headDim = Int32(shape[3])
        rotation = Int32(shape[3] & -shape[3])
        // The float nearest to 1 / sqrt(rotation): half of the exponent is exact.
        let exponent = rotation.trailingZeroBitCount
        rotationFactor = Float(sign: .plus, exponent: -(exponent / 2), significand: exponent % 2 == 0 ? 1 : Float(0.5).squareRoot())
        heedsRefusal = 0
    }
}

/// A part of a buffer where kernels say what they found: 32-bit words, 0 at first.
struct DeviceFlags {
    private let buffer: any MTLBuffer

    init(_ count: Int, _ memory: DeviceMemory) throws(MFAError) {
        buffer = try memory.make(count * MemoryLayout<UInt32>.size)
    }

    func address(_ index: Int) -> DeviceAddress {
        DeviceAddress(buffer: buffer, offset: index * MemoryLayout<UInt32>.size)
    }

    subscript(index: Int) -> Bool {
        buffer.contents().load(fromByteOffset: index * MemoryLayout<UInt32>.size, as: UInt32.self) != 0
    }
}

/// Quantising or dequantising one tensor: kernels, one after the other, of which each sees what those before it wrote.
struct QuantizePass {
    private let parameters: QuantizeParameters
    private let bindings: Bindings
    private let shape: Shape
    private var steps: [Step] = []

    private struct Step {
        let pipeline: any MTLComputePipelineState
        let groups: MTLSize
    }

    // The numbers of quantize.metal: tokens of a threadgroup, and its threads.
    private static let tokens = 32
    private static let threads = 128

    /// Codes on the device: what quantising writes.
    struct Codes {
        let precision: Precision
        var view: TensorView
        let data: DeviceAddress
        let scales: DeviceAddress
        let scaleCount: Int
        /// Nil: symmetric.
        let zeroPoints: DeviceAddress?
        /// Nil: not smoothed.
        let means: DeviceAddress?
        let rotated: Bool
    }

    /// Quantises `input`, which lies at `source`, into `codes`; of each sequence so many tokens as `sequences` says, if that is given. `refused` is set if a value
    /// is not finite; with `checksFirst` nothing is written then, else what it reaches becomes NaN.
    init(
        _ input: Tensor, at source: DeviceAddress, strides: Strides, into codes: Codes, sequences: DeviceAddress?, refused: DeviceAddress,
        checksFirst: Bool, _ memory: DeviceMemory, _ library: inout KernelLibrary
    ) throws(MFAError) {
        var parameters = QuantizeParameters(TensorView(strides: long4(strides)), codes.view, input.shape)
        parameters.heedsRefusal = checksFirst ? 1 : 0
        let isByToken = codes.view.scaleTokens == 1 && codes.view.scaleStrides.2 != 0 && codes.view.scaleStrides.3 == 0
        var bindings = Bindings()
        if let sequences {
            bindings[1] = sequences
        } else {
            let whole = Sequence(offset: 0, length: Int64(input.shape[2]))
            bindings[1] = try memory.copy([Sequence](repeating: whole, count: input.shape[0]))
        }
        bindings[2] = source
        bindings[3] = codes.data
        bindings[4] = codes.scales
        bindings[5] = codes.zeroPoints
        bindings[6] = codes.means
        if !isByToken {
            bindings[7] = DeviceAddress(buffer: try memory.make(codes.scaleCount * 2 * MemoryLayout<UInt32>.size), offset: 0)
        }
        bindings[8] = refused
        var constants = KernelConstants()
        constants.set(input.precision.rawValue, 0)
        constants.set(codes.precision.rawValue, 1)
        constants.set(codes.rotated, 2)
        constants.set(codes.means != nil, 3)
        constants.set(codes.zeroPoints != nil, 4)
        constants.set(isByToken, 5)
        self.init(parameters, bindings, input.shape)
        if codes.means != nil {
            let groups = MTLSize(width: shape[1], height: shape[0], depth: 1)
            steps.append(Step(pipeline: try library.pipeline("quantize_means_metal", of: .quantize, constants), groups: groups))
        }
        if checksFirst || !isByToken { try add("quantize_scan_metal", constants, &library) }
        try add("quantize_write_metal", constants, &library)
    }

    /// Writes the real values of `input`'s codes to `output`; of floats, their rotation undone.
    init(
        _ input: Tensor, rotated: Bool, _ inputBindings: Bindings, _ view: TensorView, to target: DeviceAddress, _ targetView: TensorView,
        _ precision: Precision, _ library: inout KernelLibrary
    ) throws(MFAError) {
        var bindings = inputBindings
        bindings[3] = target
        var constants = KernelConstants()
        constants.set(input.precision.rawValue, 0)
        constants.set(precision.rawValue, 1)
        constants.set(rotated, 2)
        for index in 3...5 { constants.set(false, index) }
        self.init(QuantizeParameters(view, targetView, input.shape), bindings, input.shape)
        try add("dequantize_metal", constants, &library)
    }

    private init(_ parameters: QuantizeParameters, _ bindings: Bindings, _ shape: Shape) {
        self.parameters = parameters
        self.bindings = bindings
        self.shape = shape
    }

    /// A kernel that works by tokens.
    private mutating func add(_ name: StaticString, _ constants: KernelConstants, _ library: inout KernelLibrary) throws(MFAError) {
        let pipeline = try library.pipeline("\(name)_\(shape[3] <= 128 ? 128 : 1024)", of: .quantize, constants)
        let width = (shape[2] + QuantizePass.tokens - 1) / QuantizePass.tokens
        steps.append(Step(pipeline: pipeline, groups: MTLSize(width: width, height: shape[1], depth: shape[0])))
    }

    func encode(_ encoder: any MTLComputeCommandEncoder) {
        encoder.setParameters(parameters, index: 0)
        bindings.set(encoder)
        for step in steps {
            encoder.setComputePipelineState(step.pipeline)
            encoder.dispatchThreadgroups(step.groups, threadsPerThreadgroup: MTLSize(width: QuantizePass.threads, height: 1, depth: 1))
        }
    }
}

extension QuantizePass.Codes {
    /// Codes in memory of the device alone, for an operand that is quantised on the way in.
    init(of operand: Tensor, _ scheme: QuantizationScheme, _ memory: DeviceMemory) throws(MFAError) {
        let shape = operand.shape
        guard let layout = ScaleLayout(scheme.granularity, shape: shape, blockSize: scheme.blockSize, groupSize: scheme.groupSize) else {
            throw .dimensions("the number of scales overflows")
        }
        func make(_ count: Int, _ size: Int) throws(MFAError) -> DeviceAddress {
            DeviceAddress(buffer: try memory.make(max(count * size, 16)), offset: 0)
        }
        let rowBytes = scheme.precision == .int4 ? (shape[3] + 1) / 2 : shape[3]
        view = TensorView(strides: long4(Layout.bhsd.strides(shape: shape, precision: scheme.precision)))
        view.place(layout, shape)
        view.hasZeroPoints = scheme.asymmetric ? 1 : 0
        view.hasMeans = scheme.smooth ? 1 : 0
        precision = scheme.precision
        data = try make(shape[0] * shape[1] * shape[2], rowBytes)
        scales = try make(layout.count, MemoryLayout<Float>.size)
        scaleCount = layout.count
        zeroPoints = scheme.asymmetric ? try make(layout.count, MemoryLayout<Int32>.size) : nil
        means = scheme.smooth ? try make(shape[0] * shape[1] * shape[3], MemoryLayout<Float>.size) : nil
        rotated = scheme.rotate
    }

    /// Codes that a caller gets.
    init(writing output: Tensor, _ results: inout DeviceResults, _ memory: DeviceMemory) throws(MFAError) {
        guard let quantization = output.quantization, let scales = quantization.scales,
            let layout = ScaleLayout(
                quantization.granularity, shape: output.shape, blockSize: quantization.blockSize, groupSize: quantization.groupSize)
        else { throw .argument("`output`: `scales` must not be NULL") }
        (data, view) = try results.add(output, memory)
        view.place(layout, output.shape)
        precision = output.precision
        self.scales = try results.add(scales, size: layout.count * MemoryLayout<Float>.size, memory)
        scaleCount = layout.count
        if let array = quantization.zeroPoints {
            zeroPoints = try results.add(array, size: layout.count * MemoryLayout<Int32>.size, memory)
        } else {
            zeroPoints = nil
        }
        if let array = quantization.channelMeans {
            let count = output.shape[0] * output.shape[1] * output.shape[3]
            means = try results.add(array, size: count * MemoryLayout<Float>.size, memory)
        } else {
            means = nil
        }
        rotated = quantization.rotated
    }
}

/// Quantising or dequantising a tensor of the caller's.
struct QuantizeCall: DeviceCall {
    private let pass: QuantizePass
    private let results: DeviceResults
    private let flags: DeviceFlags

    /// Whether there are kernels for a problem: not for FP64, nor for more tokens than kernels count.
    static func serves(_ problem: QuantizationProblem) -> Bool {
        if problem.input.precision == .fp64 || problem.output.precision == .fp64 { return false }
        return AttentionKernels.fits(problem.shape)
    }

    init(quantizing problem: QuantizationProblem, _ memory: DeviceMemory, _ library: inout KernelLibrary) throws(MFAError) {
        var results = DeviceResults()
        flags = try DeviceFlags(1, memory)
        let (source, strides) = try memory.share(problem.input)
        let codes = try QuantizePass.Codes(writing: problem.output, &results, memory)
        pass = try QuantizePass(
            problem.input, at: source, strides: strides, into: codes, sequences: nil, refused: flags.address(0), checksFirst: true, memory,
            &library)
        self.results = results
    }

    init(dequantizing problem: QuantizationProblem, _ memory: DeviceMemory, _ library: inout KernelLibrary) throws(MFAError) {
        var results = DeviceResults()
        flags = try DeviceFlags(1, memory)
        var bindings = Bindings()
        let view = try memory.bind(problem.input, to: (2, 4, 5, 6), &bindings)
        let (target, targetView) = try results.add(problem.output, memory)
        pass = try QuantizePass(
            problem.input, rotated: problem.input.quantization?.rotated ?? false, bindings, view, to: target, targetView,
            problem.output.precision, &library)
        self.results = results
    }

    func encode(_ encoder: any MTLComputeCommandEncoder) {
        pass.encode(encoder)
    }

    func finish(_ cpu: CPUBackend) throws(MFAError) {
        if flags[0] { throw .notFinite("input") }
        results.copy()
    }
}
