// Scalars (status 5), then the values of arrays: kv_lengths (3), scales (5).

extension AttentionProblem {
    func checkScalars(reading access: ArrayAccess) throws(MFAError) {
        if !softmaxScale.isFinite { throw .argument("`softmax_scale` must be finite (got \(softmaxScale))") }
        if !options.softcap.isFinite || options.softcap < 0 {
            throw .argument("`softcap` must be finite and 0 or more (got \(options.softcap))")
        }
        if options.windowLeft < -1 { throw .argument("`window_left` must be -1 or more (got \(options.windowLeft))") }
        if options.windowRight < -1 { throw .argument("`window_right` must be -1 or more (got \(options.windowRight))") }
        if !(options.dropoutP >= 0 && options.dropoutP <= 1) {
            throw .argument("`dropout_p` must be 0 to 1 (got \(options.dropoutP))")
        }
        if let offsets = options.queryOffsets, access != .none {
            for index in 0..<options.numQueryOffsets where offsets[index].magnitude >= 1 << 61 {
                throw .argument("`query_offsets` must be less than 2^61 in magnitude (got \(offsets[index]) at \(index))")
            }
        }
    }

    func checkArrays(reading access: ArrayAccess) throws(MFAError) {
        guard access != .none else { return }
        if let lengths = options.kvLengths {
            for batch in 0..<batchSize where lengths[batch] < 0 || lengths[batch] > seqLenKV {
                throw .dimensions("`kv_lengths` must be 0 to seq_len_kv, \(seqLenKV) (got \(lengths[batch]) at \(batch))")
            }
        }
        guard access == .all else { return }
        try query.checkScales("query")
        try key.checkScales("key", lengths: options.kvLengths)
        try value.checkScales("value", lengths: options.kvLengths)
    }
}

extension Tensor {
    /// Checks that the scales of a normalised tensor are finite and positive: those of the first `lengths[b]` tokens, where there are lengths.
    func checkScales(_ name: StaticString, lengths: UnsafePointer<Int64>? = nil) throws(MFAError) {
        guard hasElements, let quantization, let scales = quantization.scales,
            let layout = ScaleLayout(
                quantization.granularity, shape: shape, blockSize: quantization.blockSize, groupSize: quantization.groupSize)
        else { return }
        guard let lengths, layout.strides[2] != 0 else {
            return try Tensor.checkScales(name, scales, 0..<layout.count)
        }
        for batch in 0..<shape[0] {
            let length = Int(lengths[batch])
            let used = (length / layout.tokens + (length % layout.tokens == 0 ? 0 : 1)) * layout.strides[2]
            for head in 0..<shape[1] {
                let first = batch * layout.strides[0] + head * layout.strides[1]
                try Tensor.checkScales(name, scales, first..<first + used)
            }
        }
    }

    private static func checkScales(_ name: StaticString, _ scales: UnsafePointer<Float>, _ range: Range<Int>) throws(MFAError) {
        if Tensor.areFiniteAndPositive(scales, range) { return }
        for index in range where !(scales[index] > 0 && scales[index] < .infinity) {
            throw .argument("`\(name)`: scales must be finite and positive (got \(scales[index]) at \(index))")
        }
    }

    /// Many at once: a decoding step has far more scales than queries.
    private static func areFiniteAndPositive(_ scales: UnsafePointer<Float>, _ range: Range<Int>) -> Bool {
        typealias Bits = SIMD16<UInt32>
        // The bits of what is finite and positive are 1 ... those of the largest number.
        let end = Bits(repeating: Float.greatestFiniteMagnitude.bitPattern)
        let whole = range.lowerBound + range.count / Bits.scalarCount * Bits.scalarCount
        var outside = SIMDMask<Bits.MaskStorage>(repeating: false)
        for index in stride(from: range.lowerBound, to: whole, by: Bits.scalarCount) {
            outside .|= UnsafeRawPointer(scales + index).loadUnaligned(as: Bits.self) &- 1 .>= end
        }
        for index in whole..<range.upperBound where (scales[index].bitPattern &- 1) >= end[0] { return false }
        return outside == SIMDMask(repeating: false)
    }
}
