/// A validated call that quantises or dequantises: two tensors of one shape, one of a float type, the other of codes.
public struct QuantizationProblem {
    public let input: Tensor
    public let output: Tensor

    /// Batch, heads, tokens, channels of both.
    public var shape: Shape { input.shape }

    /// Validates quantising `input` by the scheme that the output's quantisation describes.
    public init(
        quantizing input: Tensor?, into output: Tensor?, deferred: DeferredFailures = DeferredFailures(), reading access: ArrayAccess
    ) throws(MFAError) {
        (self.input, self.output) = try QuantizationProblem.checkSizesAndPointers(input, output, deferred)
        try deferred.throwCodes()
        try self.input.checkFloat("input")
        try self.output.checkCodes("output")
        guard let quantization = self.output.quantization else {
            throw .argument("`output`: `quantization` must not be NULL: it says how to quantise")
        }
        // Even a tensor without elements can have scales, which are written.
        if quantization.scales == nil { throw .argument("`output`: `scales` must not be NULL") }
        var check = OverlapCheck()
        check.reads("input", self.input)
        check.writesQuantized("output", self.output)
        try check.run()
        if deferred.unsupported != nil && access == .all { try self.input.checkFinite("input") }
        try deferred.throwUnsupported()
    }

    /// Validates computing the real values that the codes of `input` stand for.
    public init(
        dequantizing input: Tensor?, into output: Tensor?, deferred: DeferredFailures = DeferredFailures(), reading access: ArrayAccess
    ) throws(MFAError) {
        (self.input, self.output) = try QuantizationProblem.checkSizesAndPointers(input, output, deferred)
        try deferred.throwCodes()
        try self.input.checkCodes("input")
        try self.output.checkFloat("output")
        if access == .all { try self.input.checkScales("input") }
        var check = OverlapCheck()
        check.reads("input", self.input)
        check.writes(MemoryRegion("output", self.output))
        try check.run()
        try deferred.throwUnsupported()
    }

    private static func checkSizesAndPointers(
        _ input: Tensor?, _ output: Tensor?, _ deferred: DeferredFailures
    ) throws(MFAError) -> (Tensor, Tensor) {
        try input?.checkSizes("input")
        try output?.checkSizes("output")
        for tensor in [input, output] {
            guard let tensor else { continue }
            if tensor.shape[1] < 1 { throw .dimensions("`num_heads` must be 1 or more (got 0)") }
            try checkHeadDim("head_dim", tensor.shape[3])
        }
        if let input, let output, input.shape != output.shape {
            throw .dimensions("`output` must have the shape of `input`, \(text(input.shape)) (got \(text(output.shape)))")
        }
        try deferred.throwPointers()
        guard let input else { throw .argument("`input` must not be NULL") }
        guard let output else { throw .argument("`output` must not be NULL") }
        try input.checkPointers("input")
        try output.checkPointers("output")
        return (input.normalized(), output.normalized())
    }
}

extension Tensor {
    /// Checks that elements are codes.
    fileprivate func checkCodes(_ name: StaticString) throws(MFAError) {
        if !precision.isQuantized { throw .argument("`\(name)` must be of INT8 or INT4 (got \(precision))") }
        try checkNibbles(name)
    }
}
