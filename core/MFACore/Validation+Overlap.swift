// Last phase of what a caller can get wrong: outputs may overlap nothing, themselves included (status 5). Inputs may share memory.

/// Collects what a call writes and reads, and finds the first output that overlaps anything.
struct OverlapCheck {
    private var outputs: [MemoryRegion] = []
    private var inputs: [MemoryRegion] = []

    init() {
        outputs.reserveCapacity(8)
        inputs.reserveCapacity(24)
    }

    mutating func writes(_ region: MemoryRegion?) {
        if let region { outputs.append(region) }
    }

    mutating func reads(_ region: MemoryRegion?) {
        if let region { inputs.append(region) }
    }

    /// A tensor of floats, if it is wanted.
    mutating func writes(_ name: StaticString, _ tensor: Tensor?) {
        if let tensor { writes(MemoryRegion(name, tensor)) }
    }

    /// A tensor with the arrays that its codes need.
    mutating func reads(_ name: StaticString, _ tensor: Tensor) {
        // Nothing of a tensor without elements is touched.
        guard let region = MemoryRegion(name, tensor) else { return }
        reads(region)
        for region in OverlapCheck.arrays(name, tensor) { reads(region) }
    }

    /// A tensor whose codes, scales, zero points and means are written.
    mutating func writesQuantized(_ name: StaticString, _ tensor: Tensor) {
        writes(MemoryRegion(name, tensor))
        for region in OverlapCheck.arrays(name, tensor) { writes(region) }
    }

    private static func arrays(_ name: StaticString, _ tensor: Tensor) -> [MemoryRegion] {
        guard let quantization = tensor.effectiveQuantization,
            let layout = ScaleLayout(
                quantization.granularity, shape: tensor.shape, blockSize: quantization.blockSize, groupSize: quantization.groupSize)
        else { return [] }
        let means = tensor.shape[0] * tensor.shape[1] * tensor.shape[3]
        return [
            MemoryRegion(name, field: ".scales", quantization.scales, count: layout.count, unit: 4),
            MemoryRegion(name, field: ".zero_points", quantization.zeroPoints, count: layout.count, unit: 4),
            MemoryRegion(name, field: ".channel_means", quantization.channelMeans, count: means, unit: 4),
        ].compactMap { $0 }
    }

    func run() throws(MFAError) {
        for (index, output) in outputs.enumerated() {
            if output.overlapsItself { throw .argument("`\(output.name)`: elements of an output must not share memory (strides overlap)") }
            for other in outputs[(index + 1)...] where output.overlaps(other) { throw OverlapCheck.failure(output, other) }
            for input in inputs where output.overlaps(input) { throw OverlapCheck.failure(output, input) }
        }
    }

    private static func failure(_ output: MemoryRegion, _ other: MemoryRegion) -> MFAError {
        .argument("`\(output.name)\(output.field)` must not overlap `\(other.name)\(other.field)`")
    }
}

extension AttentionProblem {
    /// Checks a forward call, or a backward call with its gradients; an inquiry about one has neither.
    func checkOverlap(_ gradients: AttentionGradients?, writesOutput: Bool) throws(MFAError) {
        guard writesOutput || gradients != nil else { return }
        let size = statisticSize
        var check = OverlapCheck()
        check.reads("query", query)
        check.reads("key", key)
        check.reads("value", value)
        if let mask = options.mask { check.reads("mask", mask) }
        check.reads(MemoryRegion("query_offsets", options.queryOffsets, count: options.numQueryOffsets, unit: 8))
        check.reads(MemoryRegion("kv_lengths", options.kvLengths, count: batchSize, unit: 8))
        check.reads(MemoryRegion("alibi_slopes", options.alibiSlopes, count: numHeads, unit: size))
        check.reads(MemoryRegion("sinks", options.sinks, count: numHeads, unit: size))
        let logsumexp = MemoryRegion("logsumexp", logsumexp, count: rowCount, unit: size)
        if writesOutput {
            check.writes("output", output)
            check.writes(logsumexp)
        } else {
            if let output { check.reads("output", output) }
            check.reads(logsumexp)
        }
        if let gradients {
            check.reads(MemoryRegion("grad_output", gradients.gradOutput))
            check.reads(MemoryRegion("grad_logsumexp", gradients.gradLogsumexp, count: rowCount, unit: size))
            let dValues = MemoryRegion("d_values", gradients.dValues, count: rowCount, unit: size)
            if gradients.dValuesGiven { check.reads(dValues) } else { check.writes(dValues) }
            check.writes("grad_query", gradients.gradQuery)
            check.writes("grad_key", gradients.gradKey)
            check.writes("grad_value", gradients.gradValue)
            check.writes("grad_mask", gradients.gradMask)
            check.writes(MemoryRegion("grad_sinks", gradients.gradSinks, count: numHeads, unit: size))
            check.writes(MemoryRegion("grad_alibi_slopes", gradients.gradAlibiSlopes, count: numHeads, unit: size))
        }
        try check.run()
    }
}
