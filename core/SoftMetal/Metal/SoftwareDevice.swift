// The device behind the interface: calls of libsoftmetal.

import Glibc
import SoftMetalLoader

/// What a failure says.
struct SoftwareError: Error, CustomStringConvertible {
    let description: String
}

/// The one device that there is.
final class SoftwareDevice: MTLDevice {
    static let shared: SoftwareDevice? = softmetal_load().map { SoftwareDevice($0) }

    nonisolated(unsafe) let functions: UnsafePointer<softmetal_functions>

    private init(_ functions: UnsafePointer<softmetal_functions>) {
        self.functions = functions
    }

    var name: String { "software Metal device" }
    var maxThreadgroupMemoryLength: Int { Int(SM_THREADGROUP_MEMORY) }

    func supportsFamily(_ gpuFamily: MTLGPUFamily) -> Bool { true }

    func makeCommandQueue() -> (any MTLCommandQueue)? { SoftwareQueue(self) }

    func makeBuffer(length: Int, options: MTLResourceOptions) -> (any MTLBuffer)? {
        // On a page and zeroed, as on a Mac; exactly as long as asked, so that AddressSanitizer sees an access beyond it.
        var memory: UnsafeMutableRawPointer?
        guard length > 0, posix_memalign(&memory, Int(sysconf(Int32(_SC_PAGESIZE))), length) == 0, let memory else { return nil }
        memset(memory, 0, length)
        return SoftwareBuffer(memory, length: length, release: { memory, _ in free(memory) })
    }

    func makeBuffer(
        bytesNoCopy pointer: UnsafeMutableRawPointer, length: Int, options: MTLResourceOptions,
        deallocator: ((UnsafeMutableRawPointer, Int) -> Void)?
    ) -> (any MTLBuffer)? {
        let page = Int(sysconf(Int32(_SC_PAGESIZE)))
        guard length > 0, Int(bitPattern: pointer) % page == 0, length % page == 0 else { return nil }
        return SoftwareBuffer(pointer, length: length, release: deallocator)
    }

    func makeLibrary(source: String, options: MTLCompileOptions?) throws -> any MTLLibrary {
        var hash: UInt64 = 0xcbf2_9ce4_8422_2325
        for byte in source.utf8 { hash = (hash ^ UInt64(byte)) &* 0x100_0000_01b3 }
        guard let library = functions.pointee.library_find(hash) else {
            throw SoftwareError(description: "libsoftmetal was built from other kernels than this library: build both anew")
        }
        return SoftwareLibrary(self, library)
    }

    func makeComputePipelineState(function: any MTLFunction) throws -> any MTLComputePipelineState {
        guard let function = function as? SoftwareFunction else { throw SoftwareError(description: "a function of another device") }
        return SoftwarePipeline(function)
    }
}

final class SoftwareBuffer: MTLBuffer, @unchecked Sendable {
    let length: Int
    private let memory: UnsafeMutableRawPointer
    private let release: ((UnsafeMutableRawPointer, Int) -> Void)?

    init(_ memory: UnsafeMutableRawPointer, length: Int, release: ((UnsafeMutableRawPointer, Int) -> Void)?) {
        self.memory = memory
        self.length = length
        self.release = release
    }

    deinit {
        release?(memory, length)
    }

    func contents() -> UnsafeMutableRawPointer { memory }
}

final class SoftwareLibrary: MTLLibrary, @unchecked Sendable {
    private let device: SoftwareDevice
    private let kernels: [OpaquePointer]

    init(_ device: SoftwareDevice, _ library: OpaquePointer) {
        self.device = device
        kernels = (0..<device.functions.pointee.library_kernel_count(library)).compactMap {
            device.functions.pointee.library_kernel(library, $0)
        }
    }

    var functionNames: [String] { kernels.map { device.functions.pointee.kernel_name($0).map { String(cString: $0) } ?? "" } }

    func makeFunction(name: String, constantValues: MTLFunctionConstantValues) throws -> any MTLFunction {
        guard let index = functionNames.firstIndex(of: name) else {
            throw SoftwareError(description: "the library has no function \(name)")
        }
        return SoftwareFunction(device, kernels[index], name, constantValues.values)
    }
}

final class SoftwareFunction: MTLFunction, @unchecked Sendable {
    let device: SoftwareDevice
    let kernel: OpaquePointer
    let name: String
    let constants: [Int: [UInt8]]

    init(_ device: SoftwareDevice, _ kernel: OpaquePointer, _ name: String, _ constants: [Int: [UInt8]]) {
        self.device = device
        self.kernel = kernel
        self.name = name
        self.constants = constants
    }
}

final class SoftwarePipeline: MTLComputePipelineState {
    let function: SoftwareFunction

    init(_ function: SoftwareFunction) {
        self.function = function
    }

    var maxTotalThreadsPerThreadgroup: Int { Int(function.device.functions.pointee.kernel_most_threads(function.kernel)) }
    var threadExecutionWidth: Int { Int(SM_SIMDGROUP_SIZE) }
}

final class SoftwareQueue: MTLCommandQueue {
    private let device: SoftwareDevice

    init(_ device: SoftwareDevice) {
        self.device = device
    }

    func makeCommandBuffer() -> (any MTLCommandBuffer)? { SoftwareCommandBuffer(device) }
}

/// Runs its dispatches when it is committed.
final class SoftwareCommandBuffer: MTLCommandBuffer {
    private let device: SoftwareDevice
    private(set) var status = MTLCommandBufferStatus.notEnqueued
    private(set) var error: (any Error)?
    private(set) var gpuStartTime = 0.0
    private(set) var gpuEndTime = 0.0
    fileprivate var dispatches: [Dispatch] = []

    init(_ device: SoftwareDevice) {
        self.device = device
    }

    func makeComputeCommandEncoder() -> (any MTLComputeCommandEncoder)? { SoftwareEncoder(self) }

    func commit() {
        gpuStartTime = monotonicTime()
        for dispatch in dispatches where error == nil { error = dispatch.run(device).map { SoftwareError(description: $0) } }
        gpuEndTime = monotonicTime()
        dispatches = []
        status = error == nil ? .completed : .error
    }

    func waitUntilCompleted() {}
}

/// Seconds since some moment.
private func monotonicTime() -> Double {
    var time = timespec()
    clock_gettime(CLOCK_MONOTONIC, &time)
    return Double(time.tv_sec) + Double(time.tv_nsec) * 1e-9
}

/// What a binding of an encoder is.
private enum Binding {
    case buffer(SoftwareBuffer, offset: Int)
    case bytes([UInt8])
}

/// A dispatch as it was encoded.
private struct Dispatch {
    let pipeline: SoftwarePipeline
    let bindings: [Int: Binding]
    let threadgroupLengths: [UInt32]
    let grid: (UInt32, UInt32, UInt32)
    let threadgroup: (UInt32, UInt32, UInt32)

    /// Why it failed, nil if it did not.
    func run(_ device: SoftwareDevice) -> String? {
        var owned: [UnsafeMutableRawPointer] = []
        defer { owned.forEach { $0.deallocate() } }
        func copy(_ bytes: [UInt8]) -> UnsafeMutableRawPointer {
            let memory = UnsafeMutableRawPointer.allocate(byteCount: max(bytes.count, 1), alignment: 16)
            owned.append(memory)
            bytes.withUnsafeBytes { if let start = $0.baseAddress { memory.copyMemory(from: start, byteCount: $0.count) } }
            return memory
        }
        var buffers = [sm_buffer](repeating: sm_buffer(), count: Int(SM_BUFFER_SLOTS))
        for (index, binding) in bindings {
            switch binding {
            case .buffer(let buffer, let offset):
                buffers[index] = sm_buffer(address: buffer.contents() + offset, length: UInt64(buffer.length - offset))
            case .bytes(let bytes):
                buffers[index] = sm_buffer(address: copy(bytes), length: UInt64(bytes.count))
            }
        }
        let constants = pipeline.function.constants.sorted { $0.key < $1.key }.map {
            sm_constant(index: UInt32($0.key), size: UInt32($0.value.count), value: UnsafeRawPointer(copy($0.value)))
        }
        var message = [CChar](repeating: 0, count: 4096)
        let failed = buffers.withUnsafeBufferPointer { buffers in
            threadgroupLengths.withUnsafeBufferPointer { lengths in
                constants.withUnsafeBufferPointer { constants in
                    var job = sm_job(
                        kernel: pipeline.function.kernel, buffers: buffers.baseAddress, threadgroup_lengths: lengths.baseAddress,
                        constants: constants.baseAddress, constant_count: UInt32(constants.count), grid: grid, threadgroup: threadgroup)
                    return device.functions.pointee.run(&job, &message, message.count) != 0
                }
            }
        }
        return failed ? String(decoding: message.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self) : nil
    }
}

/// Collects bindings and dispatches. What Metal's validation layer would refuse stops the program here as there.
final class SoftwareEncoder: MTLComputeCommandEncoder {
    private let commandBuffer: SoftwareCommandBuffer
    private var pipeline: SoftwarePipeline?
    private var bindings: [Int: Binding] = [:]
    private var threadgroupLengths = [UInt32](repeating: 0, count: Int(SM_BUFFER_SLOTS))

    init(_ commandBuffer: SoftwareCommandBuffer) {
        self.commandBuffer = commandBuffer
    }

    func endEncoding() {}

    func setComputePipelineState(_ state: any MTLComputePipelineState) {
        pipeline = state as? SoftwarePipeline
    }

    func setBuffer(_ buffer: (any MTLBuffer)?, offset: Int, index: Int) {
        guard let buffer = buffer as? SoftwareBuffer else {
            bindings[index] = nil
            return
        }
        precondition(offset >= 0 && offset <= buffer.length, "an offset lies in its buffer")
        bindings[index] = .buffer(buffer, offset: offset)
    }

    func setBytes(_ bytes: UnsafeRawPointer, length: Int, index: Int) {
        precondition(length > 0 && length <= 4096, "setBytes() takes 1 to 4096 bytes")
        bindings[index] = .bytes([UInt8](UnsafeRawBufferPointer(start: bytes, count: length)))
    }

    func setThreadgroupMemoryLength(_ length: Int, index: Int) {
        threadgroupLengths[index] = UInt32(length)
    }

    func dispatchThreadgroups(_ threadgroupsPerGrid: MTLSize, threadsPerThreadgroup: MTLSize) {
        dispatchThreads(
            MTLSize(
                width: threadgroupsPerGrid.width * threadsPerThreadgroup.width,
                height: threadgroupsPerGrid.height * threadsPerThreadgroup.height,
                depth: threadgroupsPerGrid.depth * threadsPerThreadgroup.depth), threadsPerThreadgroup: threadsPerThreadgroup)
    }

    func dispatchThreads(_ threadsPerGrid: MTLSize, threadsPerThreadgroup: MTLSize) {
        guard let pipeline else { preconditionFailure("a dispatch needs a pipeline") }
        commandBuffer.dispatches.append(
            Dispatch(
                pipeline: pipeline, bindings: bindings, threadgroupLengths: threadgroupLengths,
                grid: (UInt32(threadsPerGrid.width), UInt32(threadsPerGrid.height), UInt32(threadsPerGrid.depth)),
                threadgroup: (
                    UInt32(threadsPerThreadgroup.width), UInt32(threadsPerThreadgroup.height), UInt32(threadsPerThreadgroup.depth)
                )))
    }
}
