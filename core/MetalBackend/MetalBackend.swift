// Metal: hands validated problems to a GPU, and what there are no kernels for to the CPU, on the same memory.
//
// Written against Apple's framework. On Linux the module of that name is core/SoftMetal, a device in software.

import CPUBackend
public import MFACore
import Metal
import Support

/// Computes forward attention on a GPU, all else on the CPU.
public final class MetalBackend: Backend {
    public let device: Device
    public let info: BackendInfo
    public let arrayAccess = ArrayAccess.all
    private let cpu: CPUBackend
    private let gpu: any MTLDevice
    private let queue: any MTLCommandQueue
    private let generation = support_generation()
    private var kernels: KernelLibrary
    private var memory: DeviceMemory
    private var pending: PendingCall?

    /// Whether there is a device.
    public static var isAvailable: Bool { MTLCreateSystemDefaultDevice() != nil }

    /// `device` is what the one that the system has is called here. `threads` and `allocator` are for what the CPU computes.
    public init(_ device: Device, named name: StaticString, threads: Int, allocator: Allocator) throws(MFAError) {
        guard let gpu = MTLCreateSystemDefaultDevice(), let queue = gpu.makeCommandQueue() else {
            throw MFAError(.deviceUnavailable, "there is no device \"\(name)\" here")
        }
        guard gpu.supportsFamily(.apple7) else {
            throw MFAError(.deviceUnavailable, "the device \"\(name)\" has no matrices of simdgroups: an M1 or later has them")
        }
        cpu = try CPUBackend(threads: threads, allocator: allocator)
        self.device = device
        self.gpu = gpu
        self.queue = queue
        kernels = KernelLibrary(gpu)
        memory = DeviceMemory(gpu)
        info = BackendInfo(
            name: name, instructionSet: cpu.info.instructionSet, numThreads: cpu.info.numThreads,
            operandPrecisions: cpu.info.operandPrecisions, fallbackPrecisions: [.fp64])
    }

    /// A process that was forked off has no connection to the GPU.
    private func checkProcess() throws(MFAError) {
        if support_generation() != generation {
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
        let buffer = try memory.make(size)
        memory.remember(buffer)
        return Buffer(contents: buffer.contents(), size: size, deviceObject: buffer)
    }

    public func wrap(_ memory: UnsafeMutableRawPointer?, size: Int) throws(MFAError) -> Buffer {
        try cpu.wrap(memory, size: size)
    }

    // MARK: Attention

    public func forward(_ problem: AttentionProblem) throws(MFAError) {
        try checkProcess()
        guard let kernel = AttentionKernels.choose(problem) else { return try cpu.forward(problem) }
        if problem.isEmpty { return }
        try run(try AttentionCall(problem, kernel, memory, &kernels))
    }

    /// Has the device start a call; `finish` waits for it.
    private func run(_ call: any DeviceCall) throws(MFAError) {
        guard let commandBuffer = queue.makeCommandBuffer(), let encoder = commandBuffer.makeComputeCommandEncoder() else {
            throw MFAError(.allocationFailed, "a command buffer could not be had")
        }
        call.encode(encoder)
        encoder.endEncoding()
        commandBuffer.commit()
        pending = PendingCall(commandBuffer: commandBuffer, call: call)
    }

    public func finish() throws(MFAError) {
        guard let pending else { return }
        self.pending = nil
        pending.commandBuffer.waitUntilCompleted()
        if let error = pending.commandBuffer.error {
            throw MFAError(.executionFailed, "the device \"\(info.name)\" failed: \(error)")
        }
        try pending.call.finish(cpu)
    }

    public func backward(_ problem: BackwardProblem) throws(MFAError) {
        try checkProcess()
        guard BackwardCall.serves(problem), !problem.attention.isEmpty else { return try cpu.backward(problem) }
        try run(try BackwardCall(problem, memory, &kernels))
    }

    public func workspaceSize(forward problem: AttentionProblem) throws(MFAError) -> Int {
        AttentionKernels.choose(problem) == nil ? try cpu.workspaceSize(forward: problem) : 0
    }

    public func workspaceSize(backward problem: BackwardProblem) throws(MFAError) -> Int {
        BackwardCall.serves(problem) ? 0 : try cpu.workspaceSize(backward: problem)
    }

    public func kernelName(_ problem: AttentionProblem, _ operation: Operation) throws(MFAError) -> UnsafePointer<CChar> {
        let name = operation == .forward ? AttentionKernels.choose(problem)?.name : BackwardCall.kernelName(problem, operation)
        guard let name else { return try cpu.kernelName(problem, operation) }
        return UnsafeRawPointer(name.utf8Start).assumingMemoryBound(to: CChar.self)
    }

    // MARK: What the CPU computes

    public func quantize(_ problem: QuantizationProblem) throws(MFAError) {
        try checkProcess()
        guard QuantizeCall.serves(problem), problem.input.hasElements else { return try cpu.quantize(problem) }
        try run(try QuantizeCall(quantizing: problem, memory, &kernels))
    }

    public func dequantize(_ problem: QuantizationProblem) throws(MFAError) {
        try checkProcess()
        guard QuantizeCall.serves(problem), problem.input.hasElements else { return try cpu.dequantize(problem) }
        try run(try QuantizeCall(dequantizing: problem, memory, &kernels))
    }

    public func merge(_ problem: MergeProblem) throws(MFAError) {
        try checkProcess()
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
