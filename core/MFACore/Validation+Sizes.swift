// First phase: sizes (status 3). Products are taken at 8 bytes an element, whatever the precision. A descriptor that is not there is passed
// over: the second phase names it.

extension Tensor {
    static let largestSize = Int(UInt32.max)

    /// How far the units of this tensor reach below and above its first one; nil if that overflows at 8 bytes an element. Has elements.
    var reach: (below: Int, above: Int)? {
        let limit = Int.max / 8 - 1
        let (shape, strides) = units
        var below = 0
        var above = 0
        for axis in 0..<4 where shape[axis] > 1 {
            let (span, overflow) = (shape[axis] - 1).multipliedReportingOverflow(by: strides[axis])
            if overflow || span.magnitude > UInt(limit) { return nil }
            if span < 0 { below += -span } else { above += span }
            if below > limit || above > limit { return nil }
        }
        return (below, above)
    }

    /// Checks the sizes of one tensor, its strides against its memory, and the shape of its scales.
    func checkSizes(_ name: StaticString) throws(MFAError) {
        for axis in 0..<4 where shape[axis] < 0 || shape[axis] > Tensor.largestSize {
            throw .dimensions("`\(name)`: each size must be 0 to 4294967295 (got \(shape[axis]) for axis \(axis))")
        }
        guard shape.elementCount != nil else {
            throw .dimensions("`\(name)`: the product of its sizes overflows (got \(text(shape)))")
        }
        if let quantization = effectiveQuantization {
            try quantization.checkSizes(name, shape: shape)
        }
        guard hasElements else { return }
        guard let reach else {
            throw .dimensions("`\(name)`: its strides reach further than memory does (got \(text(strides)))")
        }
        let unit = precision.unitSize
        let (below, above) = (reach.below * unit, reach.above * unit + unit)
        if let buffer {
            let (end, overflow) = bufferOffset.addingReportingOverflow(above)
            if bufferOffset < below || overflow || end > buffer.size {
                throw .dimensions("`\(name)`: the view must lie within its buffer of \(buffer.size) bytes (got offset \(bufferOffset))")
            }
        } else if let data {
            let address = UInt(bitPattern: data)
            if address < UInt(below) || address.addingReportingOverflow(UInt(above)).overflow {
                throw .dimensions("`\(name)`: the view wraps around the address space")
            }
        }
    }
}

extension Quantization {
    func checkSizes(_ name: StaticString, shape: Shape) throws(MFAError) {
        if granularity == .block && blockSize < 1 { throw .dimensions("`\(name)`: `block_size` must be 1 or more (got \(blockSize))") }
        if granularity == .group && groupSize < 1 { throw .dimensions("`\(name)`: `group_size` must be 1 or more (got \(groupSize))") }
        guard let layout = ScaleLayout(granularity, shape: shape, blockSize: blockSize, groupSize: groupSize),
            let means = Shape(shape[0], shape[1], 1, shape[3]).elementCount
        else { throw .dimensions("`\(name)`: the number of its scales overflows") }
        try checkArray(name, scales, count: layout.count, size: 4)
        try checkArray(name, zeroPoints, count: layout.count, size: 4)
        try checkArray(name, channelMeans, count: means, size: 4)
    }
}

extension QuantizationScheme {
    func checkSizes(_ name: StaticString, shape: Shape) throws(MFAError) {
        if granularity == .block && blockSize < 1 { throw .dimensions("`\(name)`: `block_size` must be 1 or more (got \(blockSize))") }
        if granularity == .group && groupSize < 1 { throw .dimensions("`\(name)`: `group_size` must be 1 or more (got \(groupSize))") }
        guard ScaleLayout(granularity, shape: shape, blockSize: blockSize, groupSize: groupSize) != nil,
            Shape(shape[0], shape[1], 1, shape[3]).elementCount != nil
        else { throw .dimensions("`\(name)`: the number of scales overflows") }
    }
}

/// Checks that a contiguous array does not wrap around the address space. `count` is that of a product which was checked.
func checkArray(_ name: StaticString, _ array: UnsafeRawPointer?, count: Int, size: Int) throws(MFAError) {
    if let array, UInt(bitPattern: array).addingReportingOverflow(UInt(count) &* UInt(size)).overflow {
        throw .dimensions("`\(name)`: an array of \(count) elements wraps around the address space")
    }
}

func text(_ sizes: Shape) -> String { "[\(sizes[0]), \(sizes[1]), \(sizes[2]), \(sizes[3])]" }

/// Checks that two tensors, where both are there, agree in a size.
private func agree(
    _ word: StaticString, _ first: StaticString, _ one: Shape?, _ second: StaticString, _ other: Shape?, axis: Int
) throws(MFAError) {
    if let one, let other, one[axis] != other[axis] {
        throw .dimensions("`\(second)`: its \(word) must be that of `\(first)`, \(one[axis]) (got \(other[axis]))")
    }
}

/// The largest head size.
let largestHeadDim = 1024

func checkHeadDim(_ word: StaticString, _ size: Int) throws(MFAError) {
    if size < 1 || size > largestHeadDim { throw .dimensions("`\(word)` must be 1 to \(largestHeadDim) (got \(size))") }
}

extension AttentionRequest {
    /// Checks all sizes. What the flat functions call too, before they look for a training record.
    package func checkSizes() throws(MFAError) {
        try query?.checkSizes("query")
        try key?.checkSizes("key")
        try value?.checkSizes("value")
        try output?.checkSizes("output")
        try options.mask?.checkSizes("mask")

        // Shapes alone from here on: tensors are large to copy.
        let (query, key, value, output) = (query?.shape, key?.shape, value?.shape, output?.shape)
        if let query {
            if query[1] < 1 { throw .dimensions("`num_heads` must be 1 or more (got 0)") }
            try checkHeadDim("head_dim", query[3])
        }
        if let key {
            if key[1] < 1 { throw .dimensions("`num_kv_heads` must be 1 or more (got 0)") }
            try checkHeadDim("head_dim", key[3])
        }
        if let value {
            if value[1] < 1 { throw .dimensions("`num_kv_heads` must be 1 or more (got 0)") }
            try checkHeadDim("head_dim_v", value[3])
        }
        if let query, let key, query[1] % key[1] != 0 {
            throw .dimensions("`num_heads` must be a multiple of `num_kv_heads`, \(key[1]) (got \(query[1]))")
        }
        try agree("batch size", "query", query, "key", key, axis: 0)
        try agree("head size", "query", query, "key", key, axis: 3)
        try agree("batch size", "query", query, "value", value, axis: 0)
        try agree("batch size", "key", key, "value", value, axis: 0)
        try agree("number of heads", "key", key, "value", value, axis: 1)
        try agree("sequence length", "key", key, "value", value, axis: 2)
        try agree("batch size", "query", query, "output", output, axis: 0)
        try agree("number of heads", "query", query, "output", output, axis: 1)
        try agree("sequence length", "query", query, "output", output, axis: 2)
        try agree("head size", "value", value, "output", output, axis: 3)
        try checkOptionSizes()
    }

    private func checkOptionSizes() throws(MFAError) {
        let (query, key, value) = (query?.shape, key?.shape, value?.shape)
        if let mask = options.mask?.shape, let query, let key {
            let scores = Shape(query[0], query[1], query[2], key[2])
            for axis in 0..<4 where mask[axis] != 1 && mask[axis] != scores[axis] {
                throw .dimensions("`mask` must broadcast to \(text(scores)) (got \(text(mask)))")
            }
        }
        if let scheme = options.quantizeQuery, let query { try scheme.checkSizes("quantize_query", shape: query) }
        if let scheme = options.quantizeKey, let key { try scheme.checkSizes("quantize_key", shape: key) }
        if let scheme = options.quantizeValue, let value { try scheme.checkSizes("quantize_value", shape: value) }
        guard let query else { return }
        let offsets = options.numQueryOffsets
        if (options.queryOffsets != nil || offsets != 0) && offsets != 1 && offsets != query[0] {
            throw .dimensions("`num_query_offsets` must be 1 or the batch size, \(query[0]) (got \(offsets))")
        }
        let size = statisticSize
        try checkArray("logsumexp", logsumexp, count: rowCount, size: size)
        try checkArray("query_offsets", options.queryOffsets, count: offsets, size: 8)
        try checkArray("kv_lengths", options.kvLengths, count: query[0], size: 8)
        try checkArray("alibi_slopes", options.alibiSlopes, count: query[1], size: size)
        try checkArray("sinks", options.sinks, count: query[1], size: size)
    }

    var statisticSize: Int { hasDoubleStatistics ? 8 : 4 }

    /// The length of logsumexp and the like; its product was checked with the query's.
    var rowCount: Int { query.map { $0.shape[0] &* $0.shape[1] &* $0.shape[2] } ?? 0 }
}

extension GradientRequest {
    /// Checks the sizes of gradients against those of their tensors.
    package func checkSizes(of request: AttentionRequest) throws(MFAError) {
        try gradOutput?.checkSizes("grad_output")
        if let query = request.query, let value = request.value {
            let shape = Shape(query.shape[0], query.shape[1], query.shape[2], value.shape[3])
            try GradientRequest.checkShape("grad_output", gradOutput, shape)
        }
        try GradientRequest.checkSizes("grad_query", gradQuery, of: request.query)
        try GradientRequest.checkSizes("grad_key", gradKey, of: request.key)
        try GradientRequest.checkSizes("grad_value", gradValue, of: request.value)
        try GradientRequest.checkSizes("grad_mask", gradMask, of: request.options.mask)
        guard let query = request.query else { return }
        let size = request.statisticSize
        try checkArray("grad_logsumexp", gradLogsumexp, count: request.rowCount, size: size)
        try checkArray("d_values", dValues, count: request.rowCount, size: size)
        try checkArray("grad_sinks", gradSinks, count: query.shape[1], size: size)
        try checkArray("grad_alibi_slopes", gradAlibiSlopes, count: query.shape[1], size: size)
    }

    private static func checkSizes(_ name: StaticString, _ gradient: Tensor?, of tensor: Tensor?) throws(MFAError) {
        try gradient?.checkSizes(name)
        if let tensor { try checkShape(name, gradient, tensor.shape) }
    }

    private static func checkShape(_ name: StaticString, _ tensor: Tensor?, _ shape: Shape) throws(MFAError) {
        if let tensor, tensor.shape != shape {
            throw .dimensions("`\(name)` must have the shape \(text(shape)) (got \(text(tensor.shape)))")
        }
    }
}
