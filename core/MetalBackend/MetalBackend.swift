// Metal: hands validated problems to a GPU, and what there are no kernels for to the CPU, on the same memory.
//
// Written against Apple's framework. On Linux the module of that name is core/SoftMetal, a device in software.

import CPUBackend
public import MFACore
public import Metal
import Support

/// Computes on a GPU what there are kernels for, and all else on the CPU.
public final class MetalBackend: Backend {
    public let device: Device
    public let info: BackendInfo
    public let arrayAccess = ArrayAccess.all
    private let cpu: CPUBackend
    private let gpu: any MTLDevice
    private let queue: any MTLCommandQueue
    private let generation: GPUGeneration
    private let forks = support_generation()
    private let objects: MetalObjects
    private var kernels: KernelLibrary
    private let memory: DeviceMemory
    private var pending: PendingCall?
    public private(set) var deviceSeconds = 0.0

    /// Whether there is a device that has what all kernels need.
    public static var isAvailable: Bool { MTLCreateSystemDefaultDevice().flatMap { GPUGeneration($0) } != nil }

    /// `device` is what the one that the system has is called here. `threads` and `allocator` are for what the CPU computes.
    public init(
        _ device: Device, named name: StaticString, threads: Int, allocator: Allocator, objects: MetalObjects
    ) throws(MFAError) {
        guard let gpu = MTLCreateSystemDefaultDevice(), let queue = gpu.makeCommandQueue() else {
            throw MFAError(.deviceUnavailable, "there is no device \"\(name)\" here")
        }
        guard let generation = GPUGeneration(gpu) else {
            throw .unsupported("simdgroup matrices (the family Apple7: an M1 or later) are not a feature of this GPU, \"\(gpu.name)\"")
        }
        cpu = try CPUBackend(threads: threads, allocator: allocator)
        self.device = device
        self.gpu = gpu
        self.generation = generation
        self.queue = queue
        self.objects = objects
        kernels = KernelLibrary(gpu)
        memory = DeviceMemory(gpu)
        info = BackendInfo(
            name: name, instructionSet: cpu.info.instructionSet, numThreads: cpu.info.numThreads,
            operandPrecisions: cpu.info.operandPrecisions, fallbackPrecisions: [.fp64])
    }

    /// A process that was forked off has no connection to the GPU.
    private func checkProcess() throws(MFAError) {
        if support_generation() != forks {
            throw MFAError(.deviceUnavailable, "a context on \"\(info.name)\" cannot be used in a process that was forked off")
        }
    }

    // MARK: Memory

    /// Memory of the device is not workspace.
    public var heldWorkspace: Int { cpu.heldWorkspace }

    public func abandonWorkspace() {
        cpu.abandonWorkspace()
    }

    public func makeBuffer(size: Int) throws(MFAError) -> Buffer {
        try checkProcess()
        if size == 0 { return Buffer(contents: nil, size: 0) }
        let buffer = try autoreleasepool { () throws(MFAError) in try memory.make(size) }
        memory.remember(buffer)
        return Buffer(contents: buffer.contents(), size: size, deviceObject: buffer)
    }

    public func wrap(_ contents: UnsafeMutableRawPointer?, size: Int) throws(MFAError) -> Buffer {
        try checkProcess()
        // What is not whole pages is copied when it is used.
        guard let contents, let buffer = autoreleasepool(invoking: { memory.wrap(contents, size: size) }) else {
            return try cpu.wrap(contents, size: size)
        }
        memory.remember(buffer)
        return Buffer(contents: contents, size: size, deviceObject: buffer)
    }

    public func wrap(deviceBuffer: UnsafeMutableRawPointer) throws(MFAError) -> Buffer {
        try checkProcess()
        guard let buffer = objects.buffer(deviceBuffer) else { throw .argument("`metal_buffer` is released, or is not a buffer of Metal") }
        if buffer.device !== gpu { throw .argument("`metal_buffer` belongs to another device, \"\(buffer.device.name)\"") }
        if buffer.storageMode != .shared {
            throw .unsupported("buffers of Metal whose memory the host does not share (storage modes other than `shared`) are not served")
        }
        memory.remember(buffer)
        return Buffer(contents: buffer.contents(), size: buffer.length, deviceObject: buffer)
    }

    // MARK: Attention

    public func forward(_ problem: AttentionProblem) throws(MFAError) {
        try begin()
        guard let kernel = AttentionKernels.choose(problem, generation) else { return try cpu.forward(problem) }
        if problem.isEmpty { return }
        try run { () throws(MFAError) in try AttentionCall(problem, kernel, memory, &kernels) }
    }

    /// A call that computes begins.
    private func begin() throws(MFAError) {
        try checkProcess()
        deviceSeconds = 0
    }

    /// Has the device start a call; `finish` waits for it. What the framework leaves to be released later is released at the end: a thread of
    /// C's may have nobody who does.
    private func run(_ makeCall: () throws(MFAError) -> any DeviceCall) throws(MFAError) {
        try autoreleasepool { () throws(MFAError) in
            let call = try makeCall()
            guard let commandBuffer = queue.makeCommandBuffer(), let encoder = commandBuffer.makeComputeCommandEncoder() else {
                throw MFAError(.allocationFailed, "a command buffer could not be had")
            }
            call.encode(encoder)
            encoder.endEncoding()
            commandBuffer.commit()
            pending = PendingCall(commandBuffer: commandBuffer, call: call)
        }
    }

    public func finish() throws(MFAError) {
        guard let pending else { return }
        self.pending = nil
        try autoreleasepool { () throws(MFAError) in
            pending.commandBuffer.waitUntilCompleted()
            deviceSeconds = pending.commandBuffer.gpuEndTime - pending.commandBuffer.gpuStartTime
            if let error = pending.commandBuffer.error {
                throw MFAError(.executionFailed, "the device \"\(info.name)\" failed: \(error)")
            }
        }
        try pending.call.finish(cpu)
    }

    public func backward(_ problem: BackwardProblem) throws(MFAError) {
        try begin()
        guard BackwardCall.serves(problem), !problem.attention.isEmpty else { return try cpu.backward(problem) }
        try run { () throws(MFAError) in try BackwardCall(problem, memory, &kernels) }
    }

    public func workspaceSize(forward problem: AttentionProblem) throws(MFAError) -> Int {
        AttentionKernels.choose(problem, generation) == nil ? try cpu.workspaceSize(forward: problem) : 0
    }

    public func workspaceSize(backward problem: BackwardProblem) throws(MFAError) -> Int {
        BackwardCall.serves(problem) ? 0 : try cpu.workspaceSize(backward: problem)
    }

    public func kernelName(_ problem: AttentionProblem, _ operation: Operation) throws(MFAError) -> UnsafePointer<CChar> {
        let name = operation == .forward ? AttentionKernels.choose(problem, generation)?.name : BackwardCall.kernelName(problem, operation)
        guard let name else { return try cpu.kernelName(problem, operation) }
        return UnsafeRawPointer(name.utf8Start).assumingMemoryBound(to: CChar.self)
    }

    // MARK: Command buffers of the caller's

    public func fault(ofCommandBuffer pointer: UnsafeMutableRawPointer) -> String? {
        guard let commandBuffer = objects.commandBuffer(pointer) else {
            return "`command_buffer` is released, or is not a command buffer of Metal"
        }
        if commandBuffer.device !== gpu { return "`command_buffer` belongs to another device, \"\(commandBuffer.device.name)\"" }
        switch commandBuffer.status {
        case .notEnqueued, .enqueued: return nil
        default: return "`command_buffer` was committed before"
        }
    }

    public func encode(forward problem: AttentionProblem, into pointer: UnsafeMutableRawPointer) throws(MFAError) {
        try checkProcess()
        try memory.checkLocations(problem)
        guard let kernel = AttentionKernels.choose(problem, generation) else {
            throw .unsupported("\(AttentionKernels.obstacle(problem) ?? "this"): left to the CPU, which cannot be encoded")
        }
        if problem.isEmpty { return }
        try encode(into: pointer) { () throws(MFAError) in try AttentionCall(problem, kernel, memory, &kernels, isDeferred: true) }
    }

    public func encode(backward problem: BackwardProblem, into pointer: UnsafeMutableRawPointer) throws(MFAError) {
        try checkProcess()
        try memory.checkLocations(problem)
        guard BackwardCall.serves(problem) else {
            throw .unsupported("\(AttentionKernels.obstacle(problem.attention) ?? "FP64"): left to the CPU, which cannot be encoded")
        }
        if problem.attention.isEmpty { throw .unsupported("gradients without query rows: left to the CPU, which cannot be encoded") }
        try encode(into: pointer) { () throws(MFAError) in try BackwardCall(problem, memory, &kernels, isDeferred: true) }
    }

    /// Records a call, and holds it until it has run.
    private func encode(
        into pointer: UnsafeMutableRawPointer, _ makeCall: () throws(MFAError) -> any DeviceCall
    ) throws(MFAError) {
        try autoreleasepool { () throws(MFAError) in
            let call = try makeCall()
            guard let commandBuffer = objects.commandBuffer(pointer), let encoder = commandBuffer.makeComputeCommandEncoder() else {
                throw MFAError(.allocationFailed, "an encoder could not be had")
            }
            call.encode(encoder)
            encoder.endEncoding()
            let held = HeldCall(call: call)
            commandBuffer.addCompletedHandler { _ in withExtendedLifetime(held) {} }
        }
    }

    // MARK: Quantisation and merging

    public func quantize(_ problem: QuantizationProblem) throws(MFAError) {
        try begin()
        guard QuantizeCall.serves(problem), problem.input.hasElements else { return try cpu.quantize(problem) }
        try run { () throws(MFAError) in try QuantizeCall(quantizing: problem, memory, &kernels) }
    }

    public func dequantize(_ problem: QuantizationProblem) throws(MFAError) {
        try begin()
        guard QuantizeCall.serves(problem), problem.input.hasElements else { return try cpu.dequantize(problem) }
        try run { () throws(MFAError) in try QuantizeCall(dequantizing: problem, memory, &kernels) }
    }

    public func merge(_ problem: MergeProblem) throws(MFAError) {
        try begin()
        try cpu.merge(problem)
    }
}

/// What a call of the library has the device do. All memory and all pipelines that it needs are there when it exists.
protocol DeviceCall {
    /// Records its kernels, in the order in which they are to run.
    func encode(_ encoder: any MTLComputeCommandEncoder)

    /// Called when the device has run them: gives the results to the caller. What it finds that the device cannot compute, the CPU does.
    func finish(_ cpu: CPUBackend) throws(MFAError)
}

/// Work that the GPU may still be at.
private struct PendingCall {
    let commandBuffer: any MTLCommandBuffer
    let call: any DeviceCall
}

/// Keeps a call's memory alive; nobody looks at it again.
private final class HeldCall: @unchecked Sendable {
    private let call: any DeviceCall

    init(call: any DeviceCall) {
        self.call = call
    }
}

/// The objects of the framework behind the pointers that callers pass: nil if a pointer is to none, as far as that can be told.
public struct MetalObjects: Sendable {
    let buffer: @Sendable (UnsafeMutableRawPointer) -> (any MTLBuffer)?
    let commandBuffer: @Sendable (UnsafeMutableRawPointer) -> (any MTLCommandBuffer)?

    public init(
        buffer: @escaping @Sendable (UnsafeMutableRawPointer) -> (any MTLBuffer)?,
        commandBuffer: @escaping @Sendable (UnsafeMutableRawPointer) -> (any MTLCommandBuffer)?
    ) {
        self.buffer = buffer
        self.commandBuffer = commandBuffer
    }
}
