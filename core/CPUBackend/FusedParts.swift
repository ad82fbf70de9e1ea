import MFACore

/// The parts, one after the other, of a forward call whose operands are quantised on the way in and too large to be kept as codes as a whole.
struct FusedParts: Sequence {
    typealias Fused = (name: StaticString, operand: Tensor, scheme: QuantizationScheme, lengths: UnsafePointer<Int64>?)

    /// What is quantised.
    let fused: [Fused]
    private let problem: AttentionProblem
    private let headsOfPart: Int

    /// Bytes of codes up to which a call is not divided.
    private static let mostBytes = 8 << 20
    /// Query rows that a part has for each thread, lest threads run out of work at the end of each.
    private static let rowsPerThread = 512

    /// Nil for calls that are not divided: small ones, and those whose parts would not be independent.
    init?(_ problem: AttentionProblem, threads: Int32) {
        guard let query = problem.options.quantizeQuery, let key = problem.options.quantizeKey,
            let value = problem.options.quantizeValue, problem.options.dropoutP == 0
        else { return nil }
        let lengths = problem.options.kvLengths
        fused = [
            ("query", problem.query, query, nil), ("key", problem.key, key, lengths), ("value", problem.value, value, lengths),
        ]
        // One scale a tensor depends on all of it.
        if fused.contains(where: { $0.scheme.granularity == .tensor }) { return nil }
        let bytes = fused.map { $0.scheme.codeBytes(of: $0.operand) }.reduce(0, &+) / (problem.batchSize * problem.numKVHeads)
        headsOfPart = Swift.max(1, Swift.min(problem.numKVHeads, FusedParts.mostBytes / Swift.max(bytes, 1)))
        let rows = headsOfPart * (problem.numHeads / problem.numKVHeads) * problem.seqLenQ
        if headsOfPart == problem.numKVHeads && problem.batchSize == 1 { return nil }
        if bytes * problem.numKVHeads * problem.batchSize <= FusedParts.mostBytes || rows < FusedParts.rowsPerThread * Int(threads) {
            return nil
        }
        self.problem = problem
    }

    /// The part that needs the most workspace.
    var first: AttentionProblem? {
        let parts = makeIterator()
        return parts.next()
    }

    func makeIterator() -> AnyIterator<AttentionProblem> {
        var batch = 0
        var head = 0
        return AnyIterator {
            if batch == problem.batchSize { return nil }
            let heads = head..<Swift.min(head + headsOfPart, problem.numKVHeads)
            let part = problem.part(batch: batch, keyValueHeads: heads)
            head = heads.upperBound
            if head == problem.numKVHeads {
                head = 0
                batch += 1
            }
            return part
        }
    }
}

extension QuantizationScheme {
    /// The bytes of an operand's codes.
    func codeBytes(of operand: Tensor) -> Int {
        let rowBytes = precision == .int4 ? (operand.shape[3] + 1) / 2 : operand.shape[3]
        return operand.shape[0] * operand.shape[1] * operand.shape[2] * rowBytes
    }

    /// The codes of an operand, without memory: what is needed to look for values that are not finite.
    func codes(of operand: Tensor) -> Tensor {
        let neverWritten = UnsafeMutablePointer<Float>(bitPattern: MemoryLayout<Float>.alignment)
        let quantization = Quantization(
            granularity: granularity, blockSize: blockSize, groupSize: groupSize, rotated: rotate, scales: nil,
            channelMeans: smooth ? neverWritten : nil)
        return Tensor(nil, precision: precision, shape: operand.shape, quantization: quantization)
    }
}
