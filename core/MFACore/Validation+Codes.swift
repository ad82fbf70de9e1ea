// Codes and flags, and what they demand of each other (status 5).

extension Tensor {
    func checkFloat(_ name: StaticString) throws(MFAError) {
        if !precision.isFloat { throw .argument("`\(name)` must be of a float type (got \(precision))") }
    }

    func checkOperand(_ name: StaticString) throws(MFAError) {
        if precision == .bool { throw .argument("`\(name)` must be of a float type, INT8 or INT4 (got \(precision))") }
        try checkNibbles(name)
    }

    /// INT4: a step along any axis but the channels keeps to whole bytes.
    func checkNibbles(_ name: StaticString) throws(MFAError) {
        guard precision == .int4 else { return }
        for axis in 0..<3 where shape[axis] > 1 && strides[axis] & 1 != 0 {
            throw .argument("`\(name)`: strides of INT4 must be even, but for the channels' (got \(text(strides)))")
        }
    }
}

extension AttentionProblem {
    func checkCodes(_ deferred: DeferredFailures) throws(MFAError) {
        try deferred.throwCodes()
        try query.checkOperand("query")
        try key.checkOperand("key")
        try value.checkOperand("value")
        try output?.checkFloat("output")
        if let mask = options.mask, mask.precision.isQuantized {
            throw .argument("`mask` must be of BOOL or of a float type (got \(mask.precision))")
        }
        if options.queryOffsets != nil && options.alignment == .lowerRight {
            throw .argument("`alignment` must be upper left where `query_offsets` are given")
        }
        try AttentionProblem.checkScheme("query", options.quantizeQuery, of: query)
        try AttentionProblem.checkScheme("key", options.quantizeKey, of: key)
        try AttentionProblem.checkScheme("value", options.quantizeValue, of: value)

        let isKeyRotated = AttentionProblem.isRotated(key, options.quantizeKey)
        if AttentionProblem.isRotated(query, options.quantizeQuery) != isKeyRotated {
            let (rotated, other) = isKeyRotated ? ("key", "query") : ("query", "key")
            throw .argument(
                "`query` and `key` must carry the same rotation (`\(rotated)` is rotated, `\(other)` is not: quantise both with it or none)"
            )
        }
        if AttentionProblem.isRotated(value, options.quantizeValue) { throw .argument("`value` must not be rotated") }
        if AttentionProblem.isSmoothed(query, options.quantizeQuery) { throw .argument("`query` must not be smoothed: only keys are") }
        if AttentionProblem.isSmoothed(value, options.quantizeValue) { throw .argument("`value` must not be smoothed: only keys are") }
    }

    private static func isRotated(_ tensor: Tensor, _ scheme: QuantizationScheme?) -> Bool {
        scheme?.rotate ?? tensor.quantization?.rotated ?? false
    }

    private static func isSmoothed(_ tensor: Tensor, _ scheme: QuantizationScheme?) -> Bool {
        scheme?.smooth ?? (tensor.quantization?.channelMeans != nil)
    }

    private static func checkScheme(_ name: StaticString, _ scheme: QuantizationScheme?, of tensor: Tensor) throws(MFAError) {
        guard let scheme else { return }
        if !scheme.precision.isQuantized {
            throw .argument("`quantize_\(name)`: its precision must be INT8 or INT4 (got \(scheme.precision))")
        }
        if tensor.precision.isQuantized {
            throw .argument("`quantize_\(name)`: `\(name)` must be of a float type to be quantised (got \(tensor.precision))")
        }
    }
}

extension GradientRequest {
    func checkCodes(of problem: AttentionProblem) throws(MFAError) {
        try deferred.throwCodes()
        try gradOutput?.checkFloat("grad_output")
        try gradQuery?.checkFloat("grad_query")
        try gradKey?.checkFloat("grad_key")
        try gradValue?.checkFloat("grad_value")
        try gradMask?.checkFloat("grad_mask")
        if gradMask != nil {
            guard let mask = problem.options.mask, mask.precision.isFloat else {
                throw .argument("`grad_mask` must be NULL: there is no additive mask")
            }
        }
        if gradSinks != nil && problem.options.sinks == nil { throw .argument("`grad_sinks` must be NULL: there are no sinks") }
        if gradAlibiSlopes != nil && problem.options.alibiSlopes == nil {
            throw .argument("`grad_alibi_slopes` must be NULL: there are no slopes")
        }
    }
}
