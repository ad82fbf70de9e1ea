// The objects behind the interface: each holds one of libsoftmetal's.

import SoftMetalLoader

/// What a failure says.
struct SoftwareError: Error, CustomStringConvertible {
    let description: String
}

/// The functions of libsoftmetal. Only what they made gets here, so they were loaded.
private let sm = softmetal_load().pointee

/// A reference to an object of libsoftmetal.
private final class Reference: @unchecked Sendable {
    let object: OpaquePointer

    /// Takes over a reference.
    init(owning object: OpaquePointer) {
        self.object = object
    }

    deinit {
        sm.release(UnsafeMutableRawPointer(object))
    }

    /// A reference of its own to what may be an object of a kind; nil if it is none.
    init?(retaining pointer: UnsafeMutableRawPointer, kind: Int32) {
        // Held first, so that it cannot go while it is asked what it is.
        guard let object = sm.retain(pointer) else { return nil }
        guard sm.kind(object) == kind else {
            sm.release(object)
            return nil
        }
        self.object = OpaquePointer(object)
    }
}

private func copied(_ text: UnsafePointer<CChar>?) -> String? { text.map { String(cString: $0) } }

final class SoftwareDevice: MTLDevice {
    /// The one that a program gets if it asks for no other.
    static let shared: SoftwareDevice? = softmetal_is_loaded() ? sm.device_default().map { SoftwareDevice($0) } : nil

    private nonisolated(unsafe) let object: OpaquePointer

    private init(_ object: OpaquePointer) {
        self.object = object
    }

    /// The object for one of libsoftmetal's, which somebody holds.
    static func of(_ object: OpaquePointer) -> SoftwareDevice {
        if let shared, shared.object == object { return shared }
        return SoftwareDevice(object)
    }

    var name: String { copied(sm.device_name(object)) ?? "" }
    var maxThreadgroupMemoryLength: Int { Int(SM_THREADGROUP_MEMORY) }

    func supportsFamily(_ gpuFamily: MTLGPUFamily) -> Bool { sm.device_supports_family(object, Int32(gpuFamily.rawValue)) != 0 }

    func makeCommandQueue() -> (any MTLCommandQueue)? {
        sm.device_new_command_queue(object).map { SoftwareQueue(Reference(owning: $0)) }
    }

    func makeBuffer(length: Int, options: MTLResourceOptions) -> (any MTLBuffer)? {
        sm.device_new_buffer(object, UInt64(length)).map { SoftwareBuffer(Reference(owning: $0)) }
    }

    func makeBuffer(
        bytesNoCopy pointer: UnsafeMutableRawPointer, length: Int, options: MTLResourceOptions,
        deallocator: ((UnsafeMutableRawPointer, Int) -> Void)?
    ) -> (any MTLBuffer)? {
        guard let deallocator else {
            return sm.device_new_buffer_no_copy(object, pointer, UInt64(length), nil, nil).map { SoftwareBuffer(Reference(owning: $0)) }
        }
        let state = Unmanaged.passRetained(Deallocator(deallocator))
        let buffer = sm.device_new_buffer_no_copy(
            object, pointer, UInt64(length),
            { state, memory, length in
                guard let state, let memory else { return }
                Unmanaged<Deallocator>.fromOpaque(state).takeRetainedValue().body(memory, Int(length))
            }, state.toOpaque())
        guard let buffer else {
            state.release()
            return nil
        }
        return SoftwareBuffer(Reference(owning: buffer))
    }

    func makeLibrary(source: String, options: MTLCompileOptions?) throws -> any MTLLibrary {
        var hash: UInt64 = 0xcbf2_9ce4_8422_2325
        for byte in source.utf8 { hash = (hash ^ UInt64(byte)) &* 0x100_0000_01b3 }
        guard let library = sm.library_find(hash) else {
            throw SoftwareError(description: "libsoftmetal was built from other kernels than this library: build both anew")
        }
        return SoftwareLibrary(library)
    }

    func makeComputePipelineState(function: any MTLFunction) throws -> any MTLComputePipelineState {
        guard let function = function as? SoftwareFunction else { throw SoftwareError(description: "a function of another device") }
        var message = [CChar](repeating: 0, count: 4096)
        let failed = function.constants.withDescriptions { constants, count in
            sm.kernel_specialize(function.kernel, constants, count, &message, message.count)
        }
        if failed != 0 {
            throw SoftwareError(description: String(decoding: message.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self))
        }
        return SoftwarePipeline(function)
    }
}

private final class Deallocator {
    let body: (UnsafeMutableRawPointer, Int) -> Void

    init(_ body: @escaping (UnsafeMutableRawPointer, Int) -> Void) {
        self.body = body
    }
}

final class SoftwareBuffer: MTLBuffer {
    private let reference: Reference
    let length: Int

    fileprivate init(_ reference: Reference) {
        self.reference = reference
        length = Int(sm.buffer_length(reference.object))
    }

    fileprivate var object: OpaquePointer { reference.object }
    var device: any MTLDevice { SoftwareDevice.of(sm.buffer_device(object)) }
    var storageMode: MTLStorageMode { .shared }
    var label: String? {
        get { copied(sm.label(UnsafeRawPointer(object))) }
        set { sm.set_label(UnsafeMutableRawPointer(object), newValue) }
    }

    func contents() -> UnsafeMutableRawPointer { sm.buffer_contents(object) }
}

final class SoftwareLibrary: MTLLibrary, @unchecked Sendable {
    private let kernels: [OpaquePointer]

    init(_ library: OpaquePointer) {
        kernels = (0..<sm.library_kernel_count(library)).compactMap { sm.library_kernel(library, $0) }
    }

    var functionNames: [String] { kernels.map { copied(sm.kernel_name($0)) ?? "" } }

    func makeFunction(name: String, constantValues: MTLFunctionConstantValues) throws -> any MTLFunction {
        guard let index = functionNames.firstIndex(of: name) else {
            throw SoftwareError(description: "the library has no function \(name)")
        }
        return SoftwareFunction(kernels[index], name, SoftwareConstants(constantValues.values))
    }
}

final class SoftwareFunction: MTLFunction, @unchecked Sendable {
    let kernel: OpaquePointer
    let name: String
    let constants: SoftwareConstants

    init(_ kernel: OpaquePointer, _ name: String, _ constants: SoftwareConstants) {
        self.kernel = kernel
        self.name = name
        self.constants = constants
    }
}

/// The values of function constants, one after the other.
struct SoftwareConstants: Sendable {
    private let values: [(index: Int, bytes: [UInt8])]

    init(_ values: [Int: [UInt8]]) {
        self.values = values.sorted { $0.key < $1.key }.map { ($0.key, $0.value) }
    }

    /// Calls `body` with the values as C takes them.
    func withDescriptions<Result>(_ body: (UnsafePointer<sm_constant>?, UInt32) -> Result) -> Result {
        let bytes = values.flatMap { $0.bytes }
        return bytes.withUnsafeBytes { memory in
            var offset = 0
            let descriptions = values.map { value in
                defer { offset += value.bytes.count }
                return sm_constant(
                    index: UInt32(value.index), size: UInt32(value.bytes.count), value: memory.baseAddress.map { $0 + offset })
            }
            return descriptions.withUnsafeBufferPointer { body($0.baseAddress, UInt32($0.count)) }
        }
    }
}

final class SoftwarePipeline: MTLComputePipelineState {
    let function: SoftwareFunction

    init(_ function: SoftwareFunction) {
        self.function = function
    }

    var maxTotalThreadsPerThreadgroup: Int { Int(sm.kernel_most_threads(function.kernel)) }
    var threadExecutionWidth: Int { Int(SM_SIMDGROUP_SIZE) }
}

final class SoftwareQueue: MTLCommandQueue {
    private let reference: Reference

    fileprivate init(_ reference: Reference) {
        self.reference = reference
    }

    var device: any MTLDevice { SoftwareDevice.of(sm.command_queue_device(reference.object)) }

    func makeCommandBuffer() -> (any MTLCommandBuffer)? {
        sm.command_queue_new_command_buffer(reference.object, 1).map { SoftwareCommandBuffer(Reference(owning: $0)) }
    }

    func makeCommandBufferWithUnretainedReferences() -> (any MTLCommandBuffer)? {
        sm.command_queue_new_command_buffer(reference.object, 0).map { SoftwareCommandBuffer(Reference(owning: $0)) }
    }
}

final class SoftwareCommandBuffer: MTLCommandBuffer {
    private let reference: Reference

    fileprivate init(_ reference: Reference) {
        self.reference = reference
    }

    fileprivate var object: OpaquePointer { reference.object }
    var device: any MTLDevice { SoftwareDevice.of(sm.command_buffer_device(object)) }
    var status: MTLCommandBufferStatus { MTLCommandBufferStatus(rawValue: UInt(sm.command_buffer_status(object))) ?? .error }
    var error: (any Error)? { copied(sm.command_buffer_error(object)).map { SoftwareError(description: $0) } }
    var gpuStartTime: CFTimeInterval { sm.command_buffer_gpu_start_time(object) }
    var gpuEndTime: CFTimeInterval { sm.command_buffer_gpu_end_time(object) }

    func makeComputeCommandEncoder() -> (any MTLComputeCommandEncoder)? { SoftwareEncoder(self) }

    func addCompletedHandler(_ block: @escaping @Sendable (any MTLCommandBuffer) -> Void) {
        let state = Unmanaged.passRetained(CompletedHandler(block)).toOpaque()
        let failed = sm.command_buffer_add_completed_handler(
            object,
            { state, object in
                guard let state, let object, let held = Reference(retaining: UnsafeMutableRawPointer(object), kind: SM_KIND_COMMAND_BUFFER)
                else { return }
                Unmanaged<CompletedHandler>.fromOpaque(state).takeRetainedValue().block(SoftwareCommandBuffer(held))
            }, state)
        precondition(failed == 0, "a handler is added before the command buffer is committed")
    }

    func commit() {
        precondition(sm.command_buffer_commit(object) == 0, "a command buffer is committed once")
    }

    func waitUntilCompleted() { sm.command_buffer_wait_until_completed(object) }
}

private final class CompletedHandler: Sendable {
    let block: @Sendable (any MTLCommandBuffer) -> Void

    init(_ block: @escaping @Sendable (any MTLCommandBuffer) -> Void) {
        self.block = block
    }
}

/// What a binding of an encoder is.
private enum Binding {
    case buffer(SoftwareBuffer, offset: Int)
    case bytes([UInt8])
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
        var arguments = [sm_argument](repeating: sm_argument(), count: Int(SM_BUFFER_SLOTS))
        var copies: [UnsafeMutableRawBufferPointer] = []
        defer { copies.forEach { $0.deallocate() } }
        for (index, binding) in bindings {
            switch binding {
            case .buffer(let buffer, let offset):
                arguments[index].buffer = buffer.object
                arguments[index].offset = UInt64(offset)
            case .bytes(let bytes):
                let copy = UnsafeMutableRawBufferPointer.allocate(byteCount: bytes.count, alignment: 16)
                copy.copyBytes(from: bytes)
                copies.append(copy)
                arguments[index].bytes = UnsafeRawPointer(copy.baseAddress)
                arguments[index].length = UInt64(bytes.count)
            }
        }
        let failed = pipeline.function.constants.withDescriptions { constants, count in
            arguments.withUnsafeBufferPointer { arguments in
                threadgroupLengths.withUnsafeBufferPointer { lengths in
                    var dispatch = sm_dispatch(
                        kernel: pipeline.function.kernel, arguments: arguments.baseAddress, threadgroup_lengths: lengths.baseAddress,
                        constants: constants, constant_count: count, grid: threadsPerGrid.triple,
                        threadgroup: threadsPerThreadgroup.triple)
                    return sm.command_buffer_dispatch(commandBuffer.object, &dispatch)
                }
            }
        }
        precondition(failed == 0, "nothing is encoded into a command buffer that was committed")
    }
}

extension MTLSize {
    fileprivate var triple: (UInt32, UInt32, UInt32) { (UInt32(width), UInt32(height), UInt32(depth)) }
}

/// Our own: the buffer that a pointer of C stands for, an object of libsoftmetal's; nil if it is none or was released.
public func softMetalBuffer(at pointer: UnsafeMutableRawPointer) -> (any MTLBuffer)? {
    softmetal_is_loaded() ? Reference(retaining: pointer, kind: SM_KIND_BUFFER).map { SoftwareBuffer($0) } : nil
}

/// Our own: the command buffer that a pointer of C stands for, an object of libsoftmetal's; nil if it is none or was released.
public func softMetalCommandBuffer(at pointer: UnsafeMutableRawPointer) -> (any MTLCommandBuffer)? {
    softmetal_is_loaded() ? Reference(retaining: pointer, kind: SM_KIND_COMMAND_BUFFER).map { SoftwareCommandBuffer($0) } : nil
}
