/// One of two partial results of attention, or what becomes of them.
public struct PartialResult {
    /// [batch, num_heads, seq_len_q, head_dim_v], of a float type.
    public var output: Tensor?
    /// Statistics [batch, num_heads, seq_len_q].
    public var logsumexp: UnsafeMutableRawPointer?

    public init(output: Tensor?, logsumexp: UnsafeMutableRawPointer?) {
        self.output = output
        self.logsumexp = logsumexp
    }
}

/// A validated call that merges two partial results, over disjoint sets of keys, into that over their union.
public struct MergeProblem {
    public let outputA: Tensor
    public let outputB: Tensor
    public let output: Tensor
    /// Nil only where there is no row.
    public let logsumexpA: UnsafeMutableRawPointer?
    public let logsumexpB: UnsafeMutableRawPointer?
    public let logsumexp: UnsafeMutableRawPointer?
    /// FP32 or FP64.
    public let statisticsPrecision: Precision

    /// Batch, heads, query rows, channels of all three outputs.
    public var shape: Shape { output.shape }

    /// Validates a request; a nil precision is one that was not known.
    public init(
        _ a: PartialResult, _ b: PartialResult, into merged: PartialResult, statistics: Precision?,
        deferred: DeferredFailures = DeferredFailures()
    ) throws(MFAError) {
        try MergeProblem.checkSizes([("output_a", a.output), ("output_b", b.output), ("output", merged.output)])
        try deferred.throwPointers()
        outputA = try MergeProblem.checkPointers("output_a", a.output)
        outputB = try MergeProblem.checkPointers("output_b", b.output)
        output = try MergeProblem.checkPointers("output", merged.output)
        logsumexpA = a.logsumexp
        logsumexpB = b.logsumexp
        logsumexp = merged.logsumexp
        let shape = output.shape
        let rows = shape[0] &* shape[1] &* shape[2]
        let size = statistics?.unitSize ?? 1
        for (name, array) in [
            ("logsumexp_a", logsumexpA), ("logsumexp_b", logsumexpB), ("logsumexp", logsumexp),
        ] as [(StaticString, UnsafeMutableRawPointer?)] {
            if array == nil && rows > 0 { throw .argument("`\(name)` must not be NULL") }
            try checkAligned(name, array, to: size)
            try checkArray(name, array, count: rows, size: 8)
        }
        try deferred.throwCodes()
        try outputA.checkFloat("output_a")
        try outputB.checkFloat("output_b")
        try output.checkFloat("output")
        guard let statistics, statistics == .fp32 || statistics == .fp64 else {
            throw .argument("`statistics_precision` must be MFA_PRECISION_FP32 or MFA_PRECISION_FP64")
        }
        statisticsPrecision = statistics
        var check = OverlapCheck()
        check.reads("output_a", outputA)
        check.reads("output_b", outputB)
        check.reads(MemoryRegion("logsumexp_a", logsumexpA, count: rows, unit: size))
        check.reads(MemoryRegion("logsumexp_b", logsumexpB, count: rows, unit: size))
        check.writes(MemoryRegion("output", output))
        check.writes(MemoryRegion("logsumexp", logsumexp, count: rows, unit: size))
        try check.run()
        try deferred.throwUnsupported()
    }

    private static func checkSizes(_ tensors: [(StaticString, Tensor?)]) throws(MFAError) {
        var expected: Shape?
        for (name, tensor) in tensors {
            guard let tensor else { continue }
            try tensor.checkSizes(name)
            if tensor.shape[1] < 1 { throw .dimensions("`num_heads` must be 1 or more (got 0)") }
            try checkHeadDim("head_dim_v", tensor.shape[3])
            if let expected, tensor.shape != expected {
                throw .dimensions("`\(name)` must have the shape \(text(expected)) (got \(text(tensor.shape)))")
            }
            expected = tensor.shape
        }
    }

    private static func checkPointers(_ name: StaticString, _ tensor: Tensor?) throws(MFAError) -> Tensor {
        guard let tensor else { throw .argument("`\(name)` must not be NULL") }
        try tensor.checkPointers(name)
        return tensor.normalized()
    }
}
