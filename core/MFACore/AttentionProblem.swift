/// What the kernels compute with.
public enum Arithmetic: Sendable {
    case fp32
    case fp64
}

/// What of a caller's memory validation may read.
public enum ArrayAccess: Sendable {
    /// All arrays: the call is about to run on a device whose memory the host reads.
    case all
    /// Options only (kv_lengths, query_offsets): nothing runs, as when the workspace of a call is asked for.
    case options
    /// Nothing: the call runs later, or the host cannot read the memory.
    case none
}

/// Which of a problem's results must be there.
public enum Purpose: Sendable {
    /// Output is written.
    case forward
    /// Logsumexp is read.
    case backward
    /// Backward is only asked about.
    case backwardInquiry
}

/// A validated attention problem. A backend can trust every field: sizes agree, no product overflows, every pointer is good wherever there are
/// elements, no output overlaps anything. Strides of axes with one element are 0; windows are at most 2^62.
public struct AttentionProblem {
    public let batchSize: Int
    public let numHeads: Int
    public let numKVHeads: Int
    public let seqLenQ: Int
    public let seqLenKV: Int
    public let headDim: Int
    public let headDimV: Int
    public let query: Tensor
    public let key: Tensor
    public let value: Tensor
    /// Nil in backward only.
    public private(set) var output: Tensor?
    /// Never nil in backward, unless it has no element.
    public private(set) var logsumexp: UnsafeMutableRawPointer?
    /// The mask is broadcast by strides of 0.
    public let options: AttentionOptions
    public let softmaxScale: Double
    /// FP64 if an operand is.
    public let arithmetic: Arithmetic

    /// Whether there is no query row, so that forward has nothing to write.
    public var isEmpty: Bool { batchSize == 0 || seqLenQ == 0 }

    /// The length of logsumexp and the like. If one of the sizes is 0, the product of the others may wrap around, and it is 0 all the same.
    public var rowCount: Int { batchSize &* numHeads &* seqLenQ }

    /// The bytes of one statistic.
    public var statisticSize: Int { arithmetic == .fp64 ? 8 : 4 }

    /// Validates a request for `purpose`, in the order of the statuses.
    public init(_ request: AttentionRequest, for purpose: Purpose, reading access: ArrayAccess) throws(MFAError) {
        try request.checkSizes()
        try request.checkPointers(for: purpose)
        // Not `self`, which each check would copy.
        let problem = try AttentionProblem(unwrapping: request)
        try problem.checkCodes(request.deferred)
        try problem.checkScalars(reading: access)
        try problem.checkArrays(reading: access)
        try problem.checkOverlap(nil, writesOutput: purpose == .forward)
        try problem.checkServed(request.deferred, reading: access)
        self = problem
    }

    /// Takes over the fields of a request whose sizes and pointers are known to be good.
    init(unwrapping request: AttentionRequest) throws(MFAError) {
        guard let query = request.query, let key = request.key, let value = request.value else {
            throw .argument("`query`, `key` and `value` must not be NULL")
        }
        batchSize = query.shape[0]
        numHeads = query.shape[1]
        numKVHeads = key.shape[1]
        seqLenQ = query.shape[2]
        seqLenKV = key.shape[2]
        headDim = query.shape[3]
        headDimV = value.shape[3]
        self.query = query.normalized()
        self.key = key.normalized()
        self.value = value.normalized()
        output = request.output?.normalized()
        logsumexp = request.logsumexp
        arithmetic = request.hasDoubleStatistics ? .fp64 : .fp32
        softmaxScale = request.options.softmaxScale ?? 1 / Double(query.shape[3]).squareRoot()
        var options = request.options
        options.mask = options.mask?.normalized()
        options.windowLeft = min(options.windowLeft, AttentionProblem.widestWindow)
        options.windowRight = min(options.windowRight, AttentionProblem.widestWindow)
        self.options = options
    }

    /// The part of a forward problem that belongs to some key/value heads of one sequence. Operands are floats; no dropout, whose random numbers
    /// depend on the whole.
    public func part(batch: Int, keyValueHeads: Range<Int>) -> AttentionProblem {
        AttentionProblem(self, batch: batch, keyValueHeads: keyValueHeads)
    }

    /// The same forward problem with its results elsewhere, in memory that is good for them.
    public func writing(output: Tensor, logsumexp: UnsafeMutableRawPointer?) -> AttentionProblem {
        var problem = self
        problem.output = output.normalized()
        problem.logsumexp = logsumexp
        return problem
    }

    private init(_ whole: AttentionProblem, batch: Int, keyValueHeads: Range<Int>) {
        let group = whole.numHeads / whole.numKVHeads
        let heads = keyValueHeads.lowerBound * group..<keyValueHeads.upperBound * group
        batchSize = 1
        numHeads = heads.count
        numKVHeads = keyValueHeads.count
        seqLenQ = whole.seqLenQ
        seqLenKV = whole.seqLenKV
        headDim = whole.headDim
        headDimV = whole.headDimV
        query = whole.query.part(batch: batch, heads: heads)
        key = whole.key.part(batch: batch, heads: keyValueHeads)
        value = whole.value.part(batch: batch, heads: keyValueHeads)
        output = whole.output?.part(batch: batch, heads: heads)
        logsumexp = whole.logsumexp.map {
            $0 + (batch * whole.numHeads + heads.lowerBound) * whole.seqLenQ * whole.statisticSize
        }
        var options = whole.options
        options.mask = options.mask?.part(batch: batch, heads: heads)
        options.kvLengths = options.kvLengths.map { $0 + batch }
        if options.numQueryOffsets > 1 {
            options.queryOffsets = options.queryOffsets.map { $0 + batch }
            options.numQueryOffsets = 1
        }
        options.alibiSlopes = options.alibiSlopes.map { $0 + heads.lowerBound * whole.statisticSize }
        options.sinks = options.sinks.map { $0 + heads.lowerBound * whole.statisticSize }
        self.options = options
        softmaxScale = whole.softmaxScale
        arithmetic = whole.arithmetic
    }

    /// As good as no limit, and far enough from overflow for kernels to add positions to it.
    static let widestWindow: Int64 = 1 << 62
}

/// Validated gradients of a problem. Those that are wanted have elements.
public struct AttentionGradients {
    public let gradOutput: Tensor
    public let gradLogsumexp: UnsafeRawPointer?
    public let dValues: UnsafeMutableRawPointer?
    public let dValuesGiven: Bool
    public let gradQuery: Tensor?
    public let gradKey: Tensor?
    public let gradValue: Tensor?
    public let gradMask: Tensor?
    public let gradSinks: UnsafeMutableRawPointer?
    public let gradAlibiSlopes: UnsafeMutableRawPointer?

    /// Takes over the fields of a request whose sizes and pointers are known to be good.
    init(unwrapping request: GradientRequest) throws(MFAError) {
        guard let gradOutput = request.gradOutput else { throw .argument("`grad_output` must not be NULL") }
        self.gradOutput = gradOutput.normalized()
        gradLogsumexp = request.gradLogsumexp
        dValues = request.dValues
        dValuesGiven = request.dValuesGiven
        gradQuery = AttentionGradients.unlessEmpty(request.gradQuery)
        gradKey = AttentionGradients.unlessEmpty(request.gradKey)
        gradValue = AttentionGradients.unlessEmpty(request.gradValue)
        gradMask = AttentionGradients.unlessEmpty(request.gradMask)
        gradSinks = request.gradSinks
        gradAlibiSlopes = request.gradAlibiSlopes
    }

    /// A gradient that has elements to be written, else nil.
    private static func unlessEmpty(_ gradient: Tensor?) -> Tensor? {
        guard let gradient, gradient.hasElements else { return nil }
        return gradient.normalized()
    }

    /// Whether a gradient of the mask, the sinks or the slopes is wanted.
    public var wantsBias: Bool { gradMask != nil || gradSinks != nil || gradAlibiSlopes != nil }
}

/// A validated backward call.
public struct BackwardProblem {
    public let attention: AttentionProblem
    public let gradients: AttentionGradients

    /// Validates a request, in the order of the statuses.
    public init(_ request: AttentionRequest, _ gradientRequest: GradientRequest, reading access: ArrayAccess) throws(MFAError) {
        try request.checkSizes()
        try gradientRequest.checkSizes(of: request)
        try request.checkPointers(for: .backward)
        try gradientRequest.checkPointers(of: request)
        let attention = try AttentionProblem(unwrapping: request)
        let gradients = try AttentionGradients(unwrapping: gradientRequest)
        try attention.checkCodes(request.deferred)
        try gradientRequest.checkCodes(of: attention)
        try attention.checkScalars(reading: access)
        try attention.checkArrays(reading: access)
        try attention.checkOverlap(gradients, writesOutput: false)
        try attention.checkServed(request.deferred, reading: access)
        try attention.checkServed(gradientRequest.deferred, reading: access)
        self.attention = attention
        self.gradients = gradients
    }
}
