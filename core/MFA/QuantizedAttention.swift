public import MFACore

/// Scaled dot-product attention, exact or quantised, forward and backward, in memory that the caller owns.
///
///     let attention = QuantizedAttention(context: try Context())
///     try attention.forward(query: query, key: key, value: value, output: output, logsumexp: logsumexp)
///
/// Operands of INT8 or INT4 are read through their scales; float operands are quantised on the way in where
/// `AttentionOptions.quantizeQuery` and its like ask for it. Every call returns when its results are written. A call that throws has written
/// nothing, unless its status is `Status.executionFailed`.
public struct QuantizedAttention: Sendable {
    /// Where it computes.
    public let context: Context

    public init(context: Context) {
        self.context = context
    }

    /// Computes `output` and, where it is not nil, `logsumexp`: float [batch, num_heads, seq_len_q] (double if an operand is FP64), which
    /// backward reads.
    public func forward(
        query: Tensor, key: Tensor, value: Tensor, output: Tensor, logsumexp: UnsafeMutableRawPointer? = nil,
        options: AttentionOptions = AttentionOptions()
    ) throws(MFAError) {
        try context.forward(
            AttentionRequest(query: query, key: key, value: value, output: output, logsumexp: logsumexp, options: options))
    }

    /// Computes `gradQuery` and `dValues`, the rows' sums of gradOutput * output, which `backwardKeyValue` reads. Without `output` these are
    /// recomputed from the operands. `options` are forward's.
    public func backwardQuery(
        query: Tensor, key: Tensor, value: Tensor, output: Tensor? = nil, logsumexp: UnsafeMutableRawPointer, gradOutput: Tensor,
        gradLogsumexp: UnsafeRawPointer? = nil, gradQuery: Tensor, dValues: UnsafeMutableRawPointer,
        options: AttentionOptions = AttentionOptions()
    ) throws(MFAError) {
        var gradients = GradientRequest()
        gradients.gradOutput = gradOutput
        gradients.gradLogsumexp = gradLogsumexp
        gradients.dValues = dValues
        gradients.gradQuery = gradQuery
        try backward(
            query: query, key: key, value: value, output: output, logsumexp: logsumexp, gradients: gradients, options: options)
    }

    /// Computes `gradKey` and `gradValue`, where they are not nil, from the `dValues` that `backwardQuery` wrote.
    public func backwardKeyValue(
        query: Tensor, key: Tensor, value: Tensor, logsumexp: UnsafeMutableRawPointer, gradOutput: Tensor,
        gradLogsumexp: UnsafeRawPointer? = nil, dValues: UnsafeMutableRawPointer, gradKey: Tensor?, gradValue: Tensor?,
        options: AttentionOptions = AttentionOptions()
    ) throws(MFAError) {
        var gradients = GradientRequest()
        gradients.gradOutput = gradOutput
        gradients.gradLogsumexp = gradLogsumexp
        gradients.dValues = dValues
        gradients.dValuesGiven = true
        gradients.gradKey = gradKey
        gradients.gradValue = gradValue
        try backward(query: query, key: key, value: value, output: nil, logsumexp: logsumexp, gradients: gradients, options: options)
    }

    /// Computes all gradients that `gradients` names, in one call.
    public func backward(
        query: Tensor, key: Tensor, value: Tensor, output: Tensor? = nil, logsumexp: UnsafeMutableRawPointer, gradients: GradientRequest,
        options: AttentionOptions = AttentionOptions()
    ) throws(MFAError) {
        try context.backward(
            AttentionRequest(query: query, key: key, value: value, output: output, logsumexp: logsumexp, options: options), gradients)
    }
}
