import MFACore
import Metal

/// A kernel of attention_forward.metal or attention_decode.metal.
struct AttentionKernel {
    let name: StaticString
    /// The channels of a block of the output, and of a tile of keys or values.
    let channels: Int
    /// Of a decode kernel, the rows that it computes together.
    var packedRows: Int?
}

/// GPUs that get the same kernels.
enum GPUGeneration: Int, Comparable {
    /// M1, A14.
    case apple7 = 1007
    /// M2, A15, A16.
    case apple8
    /// M3, M4, A17 Pro, A18.
    case apple9
    /// M5, A19.
    case apple10

    /// Nil for a GPU without simdgroup matrices.
    init?(_ device: any MTLDevice) {
        // By their numbers: the newest ones have no names in older versions of the framework.
        let newest = [GPUGeneration.apple10, .apple9, .apple8, .apple7].first {
            MTLGPUFamily(rawValue: $0.rawValue).map { device.supportsFamily($0) } ?? false
        }
        guard let newest else { return nil }
        self = newest
    }

    static func < (left: GPUGeneration, right: GPUGeneration) -> Bool { left.rawValue < right.rawValue }
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
    /// What a tile of keys or values is made of: the operands' own type where it is the same for all three, else FP32.
    private enum TileType {
        case fp32, fp16, bf16
    }

    private typealias Row = (
        generations: ClosedRange<GPUGeneration>, type: TileType, names: (StaticString, StaticString, StaticString)
    )

    /// The widths of blocks of channels, one for each column of the table.
    private static let widths = [32, 64, 128]

    /// The kernels, by generation, type and head size: up to 32, up to 64, and all others. A name ends with the channels of a block and the
    /// columns of a tile; all compute 32 rows by 4 simdgroups.
    ///
    /// The tile lies in threadgroup memory: columns * (channels + 4) elements. The widest of FP32, 128x32, takes 17 of 32 KB. Until Apple8 a
    /// core deals that memory out when a threadgroup starts, so fewer run beside each other there; half the columns are the more careful
    /// choice. It is reasoned, not measured: no figure was taken on Apple hardware yet.
    private static let table: [Row] = [
        (.apple7 ... .apple8, .fp32, ("attention_forward_metal_32x32", "attention_forward_metal_64x32", "attention_forward_metal_128x16")),
        (.apple9 ... .apple10, .fp32, ("attention_forward_metal_32x32", "attention_forward_metal_64x32", "attention_forward_metal_128x32")),
        (
            .apple7 ... .apple10, .fp16,
            ("attention_forward_fp16_metal_32x32", "attention_forward_fp16_metal_64x32", "attention_forward_fp16_metal_128x32")
        ),
        (
            .apple7 ... .apple10, .bf16,
            ("attention_forward_bf16_metal_32x32", "attention_forward_bf16_metal_64x32", "attention_forward_bf16_metal_128x32")
        ),
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
        let options = problem.options
        if problem.arithmetic == .fp64 || problem.output?.precision == .fp64 || options.mask?.precision == .fp64 { return "FP64" }
        if !isFloat(problem.softmaxScale) || !isFloat(options.softcap) { return "a softmax_scale or softcap beyond the range of float" }
        if !fits(problem.query.shape) || !fits(problem.key.shape) { return "sizes of 2^30 and more" }
        return nil
    }

    /// How wide the kernels' blocks of channels are for a problem, nil if there are no kernels.
    static func channels(_ problem: AttentionProblem) -> Int? {
        if obstacle(problem) != nil { return nil }
        let widest = max(problem.headDim, problem.headDimV)
        return widths.first { widest <= $0 } ?? widths.last
    }

    /// The kernel that computes a problem's output, nil if there is none.
    static func choose(_ problem: AttentionProblem, _ generation: GPUGeneration) -> AttentionKernel? {
        guard let channels = channels(problem) else { return nil }
        if let decode = decodeKernel(problem) { return decode }
        let type = tileType(problem)
        guard let row = table.first(where: { $0.generations.contains(generation) && $0.type == type }) else { return nil }
        let name =
            switch channels {
            case 32: row.names.0
            case 64: row.names.1
            default: row.names.2
            }
        return AttentionKernel(name: name, channels: channels)
    }

    /// Calls with no more query rows, and with head sizes that its kernels have, are computed in two passes.
    private static let fewRows = 4

    /// The kernel for few query rows. How many rows share keys decides how many are computed together, which changes no bit of them.
    private static func decodeKernel(_ problem: AttentionProblem) -> AttentionKernel? {
        if problem.seqLenQ > fewRows { return nil }
        let isFew = problem.numHeads / problem.numKVHeads * problem.seqLenQ <= 8
        switch max(problem.headDim, problem.headDimV) {
        case ...64:
            return isFew
                ? AttentionKernel(name: "attention_decode_metal_64x8", channels: 64, packedRows: 8)
                : AttentionKernel(name: "attention_decode_metal_64x32", channels: 64, packedRows: 32)
        case ...128:
            return isFew
                ? AttentionKernel(name: "attention_decode_metal_128x8", channels: 128, packedRows: 8)
                : AttentionKernel(name: "attention_decode_metal_128x32", channels: 128, packedRows: 32)
        default:
            return nil
        }
    }

    private static func tileType(_ problem: AttentionProblem) -> TileType {
        let options = AttentionKernelOptions(problem)
        let types = [options.queryType, options.keyType, options.valueType].map { Precision(rawValue: $0) }
        if types.allSatisfy({ $0 == .fp16 }) { return .fp16 }
        return types.allSatisfy({ $0 == .bf16 }) ? .bf16 : .fp32
    }
}
