import MFACore
import Metal

/// A kernel of attention_forward.metal.
struct AttentionKernel: Hashable {
    let name: StaticString
    /// The channels of a block of the output, and of a tile of keys or values.
    let channels: Int

    static func == (left: AttentionKernel, right: AttentionKernel) -> Bool { left.channels == right.channels }

    func hash(into hasher: inout Hasher) { hasher.combine(channels) }
}

/// What a pipeline is specialised to: the function constants, in the order of their indices in attention_forward.metal.
struct AttentionKernelOptions: Hashable {
    var queryType: Int32
    var keyType: Int32
    var valueType: Int32
    var outputType: Int32
    var hasLogsumexp: Bool
    var isCausal: Bool
    var hasLeftWindow: Bool
    var hasRightWindow: Bool
    /// -1: no mask.
    var maskType: Int32
    var hasSoftcap: Bool
    var hasSlopes: Bool
    var hasSinks: Bool
    var hasDropout: Bool

    init(_ problem: AttentionProblem) {
        let options = problem.options
        queryType = problem.query.precision.rawValue
        keyType = problem.key.precision.rawValue
        valueType = problem.value.precision.rawValue
        outputType = problem.output?.precision.rawValue ?? Precision.fp32.rawValue
        hasLogsumexp = problem.logsumexp != nil
        isCausal = options.causal
        hasLeftWindow = options.windowLeft >= 0
        hasRightWindow = options.windowRight >= 0
        maskType = options.mask?.precision.rawValue ?? -1
        hasSoftcap = options.softcap > 0
        hasSlopes = options.alibiSlopes != nil
        hasSinks = options.sinks != nil
        hasDropout = options.dropoutP > 0
    }

    /// As the compiler takes them.
    var constantValues: MTLFunctionConstantValues {
        let values = MTLFunctionConstantValues()
        func set(_ value: Int32, _ index: Int) {
            withUnsafePointer(to: value) { values.setConstantValue($0, type: .int, index: index) }
        }
        func set(_ value: Bool, _ index: Int) {
            withUnsafePointer(to: value) { values.setConstantValue($0, type: .bool, index: index) }
        }
        set(queryType, 0)
        set(keyType, 1)
        set(valueType, 2)
        set(outputType, 3)
        set(hasLogsumexp, 4)
        set(isCausal, 5)
        set(hasLeftWindow, 6)
        set(hasRightWindow, 7)
        set(maskType, 8)
        set(hasSoftcap, 9)
        set(hasSlopes, 10)
        set(hasSinks, 11)
        set(hasDropout, 12)
        return values
    }
}

/// The kernels of one device, compiled when they are first used.
struct AttentionKernels {
    private let device: any MTLDevice
    private var library: (any MTLLibrary)?
    private var pipelines: [Key: any MTLComputePipelineState] = [:]

    private struct Key: Hashable {
        let kernel: AttentionKernel
        let options: AttentionKernelOptions
    }

    /// By head size: the first that is wide enough, else the last. All compute 32 rows by tiles of 32 columns in 4 simdgroups, whatever the
    /// GPU: nothing has been measured that would tell GPUs apart.
    static let table: [AttentionKernel] = [
        AttentionKernel(name: "attention_forward_metal_32", channels: 32),
        AttentionKernel(name: "attention_forward_metal_64", channels: 64),
        AttentionKernel(name: "attention_forward_metal_128", channels: 128),
    ]
    /// Sizes from here on are left to the CPU: positions in a sequence have 32 bits in kernels.
    private static let longest = 1 << 30

    init(_ device: any MTLDevice) {
        self.device = device
    }

    /// Whether a number keeps its precision as a float.
    private static func isFloat(_ number: Double) -> Bool {
        number == 0 || (Double(Float.leastNormalMagnitude)...Double(Float.greatestFiniteMagnitude)).contains(abs(number))
    }

    /// The kernel that computes a problem's output, nil if there is none: for FP64, for operands that are quantised on the way in, and for
    /// scales beyond the range of float.
    static func choose(_ problem: AttentionProblem) -> AttentionKernel? {
        let options = problem.options
        let isFused = options.quantizeQuery != nil || options.quantizeKey != nil || options.quantizeValue != nil
        let hasDouble = problem.arithmetic == .fp64 || problem.output?.precision == .fp64 || options.mask?.precision == .fp64
        if isFused || hasDouble || !isFloat(problem.softmaxScale) || !isFloat(options.softcap) { return nil }
        let widest = max(problem.headDim, problem.headDimV)
        guard let last = table.last, max(problem.batchSize, problem.seqLenQ, problem.seqLenKV) < longest, problem.numHeads < 1 << 20 else {
            return nil
        }
        return table.first { widest <= $0.channels } ?? last
    }

    /// The pipeline of a kernel for a problem's types and options.
    mutating func pipeline(
        _ kernel: AttentionKernel, _ options: AttentionKernelOptions
    ) throws(MFAError) -> any MTLComputePipelineState {
        let key = Key(kernel: kernel, options: options)
        if let pipeline = pipelines[key] { return pipeline }
        do {
            let library = try self.library ?? makeLibrary()
            self.library = library
            let function = try library.makeFunction(name: "\(kernel.name)", constantValues: options.constantValues)
            let pipeline = try device.makeComputePipelineState(function: function)
            pipelines[key] = pipeline
            return pipeline
        } catch {
            throw MFAError(.executionFailed, "the kernel \(kernel.name) could not be compiled: \(error)")
        }
    }

    /// Masks, empty rows and NaN need comparisons as IEEE 754 has them; where a fast function is good enough, the kernels name it.
    private func makeLibrary() throws -> any MTLLibrary {
        let options = MTLCompileOptions()
        if #available(macOS 15, iOS 18, *) {
            options.mathMode = .safe
        } else {
            options.fastMathEnabled = false
        }
        return try device.makeLibrary(source: KernelSources.attentionForward, options: options)
    }
}
