import CPUBackend
@_exported public import MFACore
import Support

/// A device with its threads and its workspace. It serves one call at a time: a second thread waits for the first. Different contexts are
/// independent of each other. Its workspace is given back when the last reference goes.
public final class Context: @unchecked Sendable {
    /// The device that `Device.auto` stood for, if that was asked for.
    public let device: Device
    /// What the device is and can do.
    public let info: BackendInfo
    /// The most threads that a CPU context can be created with.
    public static let mostThreads = CPUBackend.mostThreads

    private let backend: any Backend
    private let lock: OpaquePointer

    /// Creates a context. `threads` counts the caller's; 0: MFA_NUM_THREADS if set, else what the process may use.
    public init(device: Device = .auto, threads: Int = 0, allocator: Allocator = .system) throws(MFAError) {
        if threads < 0 || threads > Context.mostThreads {
            throw .argument("`num_threads` must be 0 to \(Context.mostThreads) (got \(threads))")
        }
        let backend = try DeviceRegistry.makeBackend(device, DeviceRegistry.Options(threads: threads, allocator: allocator))
        guard let lock = support_lock_create() else { throw MFAError(.allocationFailed, "memory for a context could not be had") }
        self.backend = backend
        self.device = backend.device
        self.info = backend.info
        self.lock = lock
    }

    deinit {
        support_lock_destroy(lock)
    }

    /// Runs `body` while no other call is in this context, in a floating-point environment that does not depend on the caller's: so no result
    /// does. The session must not outlive it.
    package func exclusively<Result, Failure>(_ body: (Session) throws(Failure) -> Result) throws(Failure) -> Result {
        let isWhole = support_lock_acquire(lock)
        let environment = support_environment_enter()
        defer {
            support_environment_leave(environment)
            support_lock_release(lock)
        }
        if !isWhole { backend.abandonWorkspace() }
        return try body(Session(backend: backend, isWhole: isWhole))
    }

    /// The bytes of workspace that the context holds now.
    public var heldWorkspace: Int { exclusively { $0.heldWorkspace } }

    /// Allocates `size` zeroed bytes on this context's device.
    public func makeBuffer(size: Int) throws(MFAError) -> Buffer {
        try exclusively { (session) throws(MFAError) in try session.makeBuffer(size: size) }
    }

    /// Wraps memory that the caller keeps alive as long as the buffer; no copy.
    public func wrap(_ memory: UnsafeMutableRawPointer?, size: Int) throws(MFAError) -> Buffer {
        try exclusively { (session) throws(MFAError) in try session.wrap(memory, size: size) }
    }

    /// Wraps a buffer of the device's framework, on a Mac an `MTLBuffer`, which the result holds; no copy.
    public func wrap(deviceBuffer: UnsafeMutableRawPointer) throws(MFAError) -> Buffer {
        try exclusively { (session) throws(MFAError) in try session.wrap(deviceBuffer: deviceBuffer) }
    }

    /// Seconds that the device was at work for the last call; 0 if the host did it all.
    public var deviceSeconds: Double { exclusively { $0.deviceSeconds } }

    /// Computes a problem's output and, if asked for, its logsumexp.
    public func forward(_ request: AttentionRequest) throws(MFAError) {
        try exclusively { (session) throws(MFAError) in try session.forward(request) }
    }

    /// Computes the gradients that are asked for.
    public func backward(_ request: AttentionRequest, _ gradients: GradientRequest) throws(MFAError) {
        try exclusively { (session) throws(MFAError) in try session.backward(request, gradients) }
    }

    /// Records forward into a command buffer of the caller's, on a Mac an `MTLCommandBuffer`, without committing it.
    public func encode(_ request: AttentionRequest, into commandBuffer: UnsafeMutableRawPointer) throws(MFAError) {
        try exclusively { (session) throws(MFAError) in try session.encode(request, into: commandBuffer) }
    }

    /// Records backward likewise.
    public func encode(
        _ request: AttentionRequest, _ gradients: GradientRequest, into commandBuffer: UnsafeMutableRawPointer
    ) throws(MFAError) {
        try exclusively { (session) throws(MFAError) in try session.encode(request, gradients, into: commandBuffer) }
    }

    /// The bytes of workspace that a forward call would hold.
    public func workspaceSize(_ request: AttentionRequest) throws(MFAError) -> Int {
        try exclusively { (session) throws(MFAError) in try session.workspaceSize(request, nil) }
    }

    /// The bytes of workspace that a backward call would hold.
    public func workspaceSize(_ request: AttentionRequest, _ gradients: GradientRequest) throws(MFAError) -> Int {
        try exclusively { (session) throws(MFAError) in try session.workspaceSize(request, gradients) }
    }

    /// The name of the kernel that a problem would use.
    public func kernelName(_ request: AttentionRequest, _ operation: Operation) throws(MFAError) -> String {
        try exclusively { (session) throws(MFAError) in String(cString: try session.kernelName(request, operation)) }
    }

    /// Quantises `input`, of a float type, by the scheme that the output's quantisation describes.
    public func quantize(_ input: Tensor, into output: Tensor) throws(MFAError) {
        try exclusively { (session) throws(MFAError) in
            try session.quantize(input, into: output, DeferredFailures())
        }
    }

    /// Writes the real values that the codes of `input` stand for.
    public func dequantize(_ input: Tensor, into output: Tensor) throws(MFAError) {
        try exclusively { (session) throws(MFAError) in
            try session.dequantize(input, into: output, DeferredFailures())
        }
    }
}

extension Context {
    /// Merges two partial results, over disjoint sets of keys, into that over their union. `statistics`: FP32 or FP64.
    public func merge(
        _ a: PartialResult, _ b: PartialResult, into merged: PartialResult, statistics: Precision = .fp32
    ) throws(MFAError) {
        try exclusively { (session) throws(MFAError) in
            try session.merge(a, b, into: merged, statistics: statistics, DeferredFailures())
        }
    }
}

/// What a thread can do while it has a context to itself: validate a request, hand it to the backend, and wait for the results.
package struct Session {
    fileprivate let backend: any Backend
    /// Whether what the context's lock guards is whole: it is not if a thread was changing it when this process was forked off.
    package let isWhole: Bool

    package var heldWorkspace: Int { backend.heldWorkspace }

    package var deviceSeconds: Double { backend.deviceSeconds }

    package func makeBuffer(size: Int) throws(MFAError) -> Buffer {
        if size < 0 { throw .dimensions("`size` must be 0 to 2^63 - 1 (got \(UInt(bitPattern: size)))") }
        return try backend.makeBuffer(size: size)
    }

    package func wrap(_ memory: UnsafeMutableRawPointer?, size: Int) throws(MFAError) -> Buffer {
        if size < 0 || UInt(bitPattern: memory).addingReportingOverflow(UInt(bitPattern: size)).overflow {
            throw .dimensions("`size`: the memory wraps around the address space (got \(UInt(bitPattern: size)))")
        }
        if memory == nil && size > 0 { throw .argument("`memory` must not be NULL for a buffer of \(size) bytes") }
        return try backend.wrap(memory, size: size)
    }

    package func wrap(deviceBuffer: UnsafeMutableRawPointer) throws(MFAError) -> Buffer {
        try backend.wrap(deviceBuffer: deviceBuffer)
    }

    /// Runs a validated call. In the order of the statuses its inputs come before what is not served and before workspace, but the backend
    /// looks at them last, when it quantises them: so `inputs` checks them where one of the two failed.
    private func run(_ call: () throws(MFAError) -> Void, inputs check: () throws(MFAError) -> Void) throws(MFAError) {
        do throws(MFAError) {
            try call()
        } catch {
            if backend.arrayAccess == .all && (error.status == .unsupported || error.status == .allocationFailed) { try check() }
            throw error
        }
        try backend.finish()
    }

    package func forward(_ request: AttentionRequest) throws(MFAError) {
        let problem = try AttentionProblem(request, for: .forward, reading: backend.arrayAccess)
        try run(
            { () throws(MFAError) in try backend.forward(problem) }, inputs: { () throws(MFAError) in try problem.checkFusedInputs() })
    }

    package func backward(_ request: AttentionRequest, _ gradients: GradientRequest) throws(MFAError) {
        let problem = try BackwardProblem(request, gradients, reading: backend.arrayAccess)
        try run(
            { () throws(MFAError) in try backend.backward(problem) },
            inputs: { () throws(MFAError) in try problem.attention.checkFusedInputs() })
    }

    /// Records forward, or with gradients backward, into a command buffer of the caller's: nothing of the operands' memory is read.
    package func encode(
        _ request: AttentionRequest, _ gradients: GradientRequest? = nil, into commandBuffer: UnsafeMutableRawPointer?
    ) throws(MFAError) {
        var request = request
        if let fault = commandBuffer.map({ backend.fault(ofCommandBuffer: $0) }) ?? "`command_buffer` must not be NULL" {
            request.deferred.notePointer(fault)
        }
        guard let gradients else {
            let problem = try AttentionProblem(request, for: .forward, reading: .none)
            if let commandBuffer { try backend.encode(forward: problem, into: commandBuffer) }
            return
        }
        let problem = try BackwardProblem(request, gradients, reading: .none)
        if let commandBuffer { try backend.encode(backward: problem, into: commandBuffer) }
    }

    /// Of forward without gradients, else of backward.
    package func workspaceSize(_ request: AttentionRequest, _ gradients: GradientRequest?) throws(MFAError) -> Int {
        guard let gradients else {
            return try backend.workspaceSize(forward: try AttentionProblem(request, for: .forward, reading: .options))
        }
        return try backend.workspaceSize(backward: try BackwardProblem(request, gradients, reading: .options))
    }

    package func kernelName(_ request: AttentionRequest, _ operation: Operation) throws(MFAError) -> UnsafePointer<CChar> {
        let purpose = operation == .forward ? Purpose.forward : .backwardInquiry
        return try backend.kernelName(try AttentionProblem(request, for: purpose, reading: .options), operation)
    }

    package func quantize(_ input: Tensor?, into output: Tensor?, _ deferred: DeferredFailures) throws(MFAError) {
        let problem = try QuantizationProblem(quantizing: input, into: output, deferred: deferred, reading: backend.arrayAccess)
        try run(
            { () throws(MFAError) in try backend.quantize(problem) },
            inputs: { () throws(MFAError) in try problem.input.checkFinite("input") })
    }

    package func dequantize(_ input: Tensor?, into output: Tensor?, _ deferred: DeferredFailures) throws(MFAError) {
        try backend.dequantize(try QuantizationProblem(dequantizing: input, into: output, deferred: deferred, reading: backend.arrayAccess))
        try backend.finish()
    }

    package func merge(
        _ a: PartialResult, _ b: PartialResult, into merged: PartialResult, statistics: Precision?, _ deferred: DeferredFailures
    ) throws(MFAError) {
        try backend.merge(try MergeProblem(a, b, into: merged, statistics: statistics, deferred: deferred))
        try backend.finish()
    }
}
