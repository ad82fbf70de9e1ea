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
    /// Whether it runs when the call is long over: nobody has looked at the operands.
    var isDeferred: Bool

    init(_ problem: AttentionProblem, isDeferred: Bool = false) {
        let options = problem.options
        queryType = (options.quantizeQuery?.precision ?? problem.query.precision).rawValue
        keyType = (options.quantizeKey?.precision ?? problem.key.precision).rawValue
        valueType = (options.quantizeValue?.precision ?? problem.value.precision).rawValue
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
        self.isDeferred = isDeferred
    }

    /// Whether an operand is quantised.
    var hasCodes: Bool { [queryType, keyType, valueType].contains { Precision(rawValue: $0)?.isQuantized ?? false } }

    /// For the compiler.
    var constants: KernelConstants {
        var constants = KernelConstants()
        constants.set(queryType, 0)
        constants.set(keyType, 1)
        constants.set(valueType, 2)
        constants.set(outputType, 3)
        constants.set(hasLogsumexp, 4)
        constants.set(isCausal, 5)
        constants.set(hasLeftWindow, 6)
        constants.set(hasRightWindow, 7)
        constants.set(maskType, 8)
        constants.set(hasSoftcap, 9)
        constants.set(hasSlopes, 10)
        constants.set(hasSinks, 11)
        constants.set(hasDropout, 12)
        constants.set(isDeferred, 30)
        return constants
    }
}

/// Which kernels serve what.
enum AttentionKernels {
    /// By head size: the first that is wide enough, else the last. All compute 32 rows by tiles of 32 columns in 4 simdgroups, whatever the
    /// GPU: nothing has been measured that would tell GPUs apart.
    static let table: [AttentionKernel] = [
        AttentionKernel(name: "attention_forward_metal_32", channels: 32),
        AttentionKernel(name: "attention_forward_metal_64", channels: 64),
        AttentionKernel(name: "attention_forward_metal_128", channels: 128),
    ]
    /// Sizes from here on are left to the CPU: positions in a sequence have 32 bits in kernels.
    private static let longest = 1 << 30

    /// Whether a number keeps its precision as a float.
    private static func isFloat(_ number: Double) -> Bool {
        number == 0 || (Double(Float.leastNormalMagnitude)...Double(Float.greatestFiniteMagnitude)).contains(abs(number))
    }

    /// Whether kernels can count a tensor's sequences, heads and tokens.
    static func fits(_ shape: Shape) -> Bool { max(shape[0], shape[2]) < longest && shape[1] < 1 << 20 }

    /// The feature for which there are no kernels for a problem; nil if there are.
    static func obstacle(_ problem: AttentionProblem) -> String? {
        if problem.arithmetic == .fp64 || problem.output?.precision == .fp64 || problem.options.mask?.precision == .fp64 { return "FP64" }
        if !isFloat(problem.softmaxScale) || !isFloat(problem.options.softcap) { return "a softmax_scale or softcap beyond the range of float" }
        if !fits(problem.query.shape) || !fits(problem.key.shape) { return "sizes of 2^30 and more" }
        return nil
    }

    /// How wide the kernels' blocks of channels are for a problem, nil if there are no kernels.
    static func channels(_ problem: AttentionProblem) -> Int? {
        if obstacle(problem) != nil { return nil }
        let widest = max(problem.headDim, problem.headDimV)
        return table.first { widest <= $0.channels }?.channels ?? table.last?.channels
    }

    /// The kernel that computes a problem's output, nil if there is none.
    static func choose(_ problem: AttentionProblem) -> AttentionKernel? {
        guard let channels = channels(problem) else { return nil }
        return table.first { $0.channels == channels }
    }
}
