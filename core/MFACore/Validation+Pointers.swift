// Second phase: pointers (status 5). A tensor without elements may be NULL.

extension Tensor {
    /// Checks the address of a tensor and of its scales.
    func checkPointers(_ name: StaticString) throws(MFAError) {
        if buffer != nil && data != nil { throw .argument("`\(name)`: `data` must be NULL where `buffer` is given") }
        guard hasElements else { return }
        if buffer == nil && data == nil { throw .argument("`\(name)` must not be NULL") }
        try checkAligned(name, address, to: precision.unitSize)
        if let quantization = effectiveQuantization {
            guard let scales = quantization.scales else { throw .argument("`\(name)`: `scales` must not be NULL") }
            try checkAligned(name, scales, to: 4)
            try checkAligned(name, quantization.zeroPoints, to: 4)
            try checkAligned(name, quantization.channelMeans, to: 4)
        }
    }
}

/// Checks that an address is a multiple of its elements' size.
func checkAligned(_ name: StaticString, _ address: UnsafeRawPointer?, to size: Int) throws(MFAError) {
    let address = UInt(bitPattern: address)
    if address % UInt(size) != 0 {
        throw .argument("`\(name)` must be aligned to \(size) bytes (got address 0x\(String(address, radix: 16)))")
    }
}

extension AttentionRequest {
    /// Checks all pointers. What the flat functions call too, before they look for a training record. Sizes were checked.
    package func checkPointers(for purpose: Purpose) throws(MFAError) {
        try deferred.throwPointers()
        guard let query else { throw .argument("`query` must not be NULL") }
        guard let key else { throw .argument("`key` must not be NULL") }
        guard let value else { throw .argument("`value` must not be NULL") }
        if output == nil && purpose == .forward { throw .argument("`output` must not be NULL") }
        try query.checkPointers("query")
        try key.checkPointers("key")
        try value.checkPointers("value")
        try output?.checkPointers("output")
        try options.mask?.checkPointers("mask")
        if logsumexp == nil && purpose == .backward && rowCount > 0 { throw .argument("`logsumexp` must not be NULL") }
        if options.numQueryOffsets > 0 && options.queryOffsets == nil { throw .argument("`query_offsets` must not be NULL") }
        try checkAligned("logsumexp", logsumexp, to: statisticSize)
        try checkAligned("query_offsets", options.queryOffsets, to: 8)
        try checkAligned("kv_lengths", options.kvLengths, to: 8)
        try checkAligned("alibi_slopes", options.alibiSlopes, to: statisticSize)
        try checkAligned("sinks", options.sinks, to: statisticSize)
    }
}

extension GradientRequest {
    /// Checks all pointers. Sizes were checked.
    package func checkPointers(of request: AttentionRequest) throws(MFAError) {
        try deferred.throwPointers()
        guard let gradOutput else { throw .argument("`grad_output` must not be NULL") }
        try gradOutput.checkPointers("grad_output")
        try gradQuery?.checkPointers("grad_query")
        try gradKey?.checkPointers("grad_key")
        try gradValue?.checkPointers("grad_value")
        try gradMask?.checkPointers("grad_mask")
        if dValuesGiven && dValues == nil && request.rowCount > 0 { throw .argument("`d_values` must not be NULL where it is given") }
        let size = request.statisticSize
        try checkAligned("grad_logsumexp", gradLogsumexp, to: size)
        try checkAligned("d_values", dValues, to: size)
        try checkAligned("grad_sinks", gradSinks, to: size)
        try checkAligned("grad_alibi_slopes", gradAlibiSlopes, to: size)
    }
}
