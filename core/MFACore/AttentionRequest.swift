/// Failures that were met while a request was put together, kept until validation comes to them: an argument may be checked early, but what is
/// reported is what comes first in the order of the statuses.
public struct DeferredFailures: Sendable {
    private(set) var pointers: MFAError?
    private(set) var codes: MFAError?
    private(set) var unsupported: MFAError?

    public init() {}

    /// Keeps the first failure about a pointer or a descriptor that cannot be read.
    public mutating func notePointer(_ message: @autoclosure () -> String) {
        if pointers == nil { pointers = .argument(message()) }
    }

    /// Keeps the first failure about a code or a flag.
    public mutating func noteCode(_ message: @autoclosure () -> String) {
        if codes == nil { codes = .argument(message()) }
    }

    /// Keeps the first failure about a feature that is not served.
    public mutating func noteUnsupported(_ message: @autoclosure () -> String) {
        if unsupported == nil { unsupported = .unsupported(message()) }
    }

    package func throwPointers() throws(MFAError) { if let pointers { throw pointers } }
    package func throwCodes() throws(MFAError) { if let codes { throw codes } }
    package func throwUnsupported() throws(MFAError) { if let unsupported { throw unsupported } }
}

/// Everything about an attention problem that is neither an operand nor a result. The rules are in docs/numerics.md.
public struct AttentionOptions {
    /// Multiplies the scores; nil: 1 / sqrt(head_dim).
    public var softmaxScale: Double?
    /// Broadcasts (sizes 1) to [batch, num_heads, seq_len_q, seq_len_kv]. BOOL: nonzero = attend; a float type: added to the scores.
    public var mask: Tensor?
    /// Row i attends columns up to i + off.
    public var causal = false
    /// What off is.
    public var alignment = Alignment.upperLeft
    /// off itself, in place of `alignment`: one, or one a sequence.
    public var queryOffsets: UnsafePointer<Int64>?
    public var numQueryOffsets = 0
    /// 0: off.
    public var softcap: Double = 0
    /// -1: no limit on that side.
    public var windowLeft: Int64 = -1
    public var windowRight: Int64 = -1
    /// [batch]; keys and values beyond are never read. Nil: all are seq_len_kv.
    public var kvLengths: UnsafePointer<Int64>?
    /// Statistics [num_heads]: float, or double if an operand is FP64.
    public var alibiSlopes: UnsafeRawPointer?
    /// Statistics [num_heads]; -inf: no sink for that head.
    public var sinks: UnsafeRawPointer?
    public var dropoutP: Double = 0
    public var seed: UInt64 = 0
    public var dropoutOffset: UInt32 = 0
    /// Quantise this float operand first.
    public var quantizeQuery: QuantizationScheme?
    public var quantizeKey: QuantizationScheme?
    public var quantizeValue: QuantizationScheme?

    public init() {}
}

/// What a caller asks for, before anything was checked.
public struct AttentionRequest {
    /// [batch, num_heads, seq_len_q, head_dim]
    public var query: Tensor?
    /// [batch, num_kv_heads, seq_len_kv, head_dim]
    public var key: Tensor?
    /// [batch, num_kv_heads, seq_len_kv, head_dim_v]
    public var value: Tensor?
    /// [batch, num_heads, seq_len_q, head_dim_v]. Optional in backward.
    public var output: Tensor?
    /// Statistics [batch, num_heads, seq_len_q]. Optional in forward.
    public var logsumexp: UnsafeMutableRawPointer?
    public var options: AttentionOptions
    public var deferred = DeferredFailures()

    public init(
        query: Tensor?, key: Tensor?, value: Tensor?, output: Tensor?, logsumexp: UnsafeMutableRawPointer?,
        options: AttentionOptions = AttentionOptions()
    ) {
        self.query = query
        self.key = key
        self.value = value
        self.output = output
        self.logsumexp = logsumexp
        self.options = options
    }

    /// Whether statistics are double.
    var hasDoubleStatistics: Bool { query?.precision == .fp64 || key?.precision == .fp64 || value?.precision == .fp64 }
}

/// The gradients that a caller asks for, before anything was checked. A nil gradient is not computed.
public struct GradientRequest {
    /// Shape of the output.
    public var gradOutput: Tensor?
    /// Statistics [batch, num_heads, seq_len_q]; nil: 0.
    public var gradLogsumexp: UnsafeRawPointer?
    /// Statistics [batch, num_heads, seq_len_q]; nil: kept in workspace.
    public var dValues: UnsafeMutableRawPointer?
    /// Whether `dValues` is read rather than written.
    public var dValuesGiven = false
    public var gradQuery: Tensor?
    public var gradKey: Tensor?
    public var gradValue: Tensor?
    /// Of an additive mask, in the mask's own shape.
    public var gradMask: Tensor?
    /// Statistics [num_heads].
    public var gradSinks: UnsafeMutableRawPointer?
    /// Statistics [num_heads].
    public var gradAlibiSlopes: UnsafeMutableRawPointer?
    public var deferred = DeferredFailures()

    public init() {}
}
