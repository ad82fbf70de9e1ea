/// What a device is and can do. Strings are static.
public struct BackendInfo: Sendable {
    public let name: StaticString
    /// That the kernels in use were compiled for.
    public let instructionSet: StaticString
    public let numThreads: Int
    public let operandPrecisions: Set<Precision>
    /// Those of them that the device leaves to the CPU kernels.
    public let fallbackPrecisions: Set<Precision>

    public init(
        name: StaticString, instructionSet: StaticString, numThreads: Int, operandPrecisions: Set<Precision>,
        fallbackPrecisions: Set<Precision> = []
    ) {
        self.name = name
        self.instructionSet = instructionSet
        self.numThreads = numThreads
        self.operandPrecisions = operandPrecisions
        self.fallbackPrecisions = fallbackPrecisions
    }
}

/// A device that computes validated problems for one context; used by one thread at a time.
///
/// Work may run on after a call has returned: what it wrote is there once `finish` has returned. So a device with queues and with memory of its
/// own fits as well as one that computes at once. Before a call takes effect, in this order: a feature that is not served is refused, a
/// non-finite value among the inputs of a fused call, then all workspace is taken. Only after that is an output byte written.
public protocol Backend: AnyObject {
    /// Never `Device.auto`.
    var device: Device { get }
    /// What the device is and can do.
    var info: BackendInfo { get }
    /// What validation may read of the operands' memory here.
    var arrayAccess: ArrayAccess { get }
    /// The bytes of workspace held now.
    var heldWorkspace: Int { get }

    /// Memory of this device, zeroed.
    func makeBuffer(size: Int) throws(MFAError) -> Buffer
    /// The caller's memory, which he keeps alive, made usable by this device.
    func wrap(_ memory: UnsafeMutableRawPointer?, size: Int) throws(MFAError) -> Buffer
    /// A buffer of the device's framework, which the result holds.
    func wrap(deviceBuffer: UnsafeMutableRawPointer) throws(MFAError) -> Buffer

    /// Writes the output and, where there is one, the logsumexp.
    func forward(_ problem: AttentionProblem) throws(MFAError)
    /// Writes the gradients that are there, and d_values where they are not given.
    func backward(_ problem: BackwardProblem) throws(MFAError)
    /// Writes codes, scales, and zero points and means where they are wanted.
    func quantize(_ problem: QuantizationProblem) throws(MFAError)
    /// Writes the real values that codes stand for.
    func dequantize(_ problem: QuantizationProblem) throws(MFAError)
    /// Writes the result over the union of two sets of keys.
    func merge(_ problem: MergeProblem) throws(MFAError)
    /// Waits until all results are written.
    func finish() throws(MFAError)
    /// Seconds that the device was at work for the last call; 0 if the host did it all.
    var deviceSeconds: Double { get }

    /// What is wrong with a command buffer of the caller's; nil if nothing is.
    func fault(ofCommandBuffer commandBuffer: UnsafeMutableRawPointer) -> String?
    /// Records forward into a command buffer of the caller's. Nothing of the operands was read, nor is it here.
    func encode(forward problem: AttentionProblem, into commandBuffer: UnsafeMutableRawPointer) throws(MFAError)
    /// Records backward likewise.
    func encode(backward problem: BackwardProblem, into commandBuffer: UnsafeMutableRawPointer) throws(MFAError)

    /// The bytes of workspace that a forward call would hold.
    func workspaceSize(forward problem: AttentionProblem) throws(MFAError) -> Int
    /// The bytes of workspace that a backward call would hold.
    func workspaceSize(backward problem: BackwardProblem) throws(MFAError) -> Int
    /// The kernel that the problem would use for an operation: a static string.
    func kernelName(_ problem: AttentionProblem, _ operation: Operation) throws(MFAError) -> UnsafePointer<CChar>

    /// Forgets workspace that a thread which no longer exists, after fork(), may have been changing.
    func abandonWorkspace()
}

/// A device without a framework of its own.
extension Backend {
    public var deviceSeconds: Double { 0 }

    public func wrap(deviceBuffer: UnsafeMutableRawPointer) throws(MFAError) -> Buffer {
        throw .unsupported("buffers around one of Metal's are not served by the device \"\(info.name)\"")
    }

    public func fault(ofCommandBuffer commandBuffer: UnsafeMutableRawPointer) -> String? { nil }

    public func encode(forward problem: AttentionProblem, into commandBuffer: UnsafeMutableRawPointer) throws(MFAError) {
        throw .unsupported("encoding into a command buffer is not served by the device \"\(info.name)\"")
    }

    public func encode(backward problem: BackwardProblem, into commandBuffer: UnsafeMutableRawPointer) throws(MFAError) {
        throw .unsupported("encoding into a command buffer is not served by the device \"\(info.name)\"")
    }
}
