import CMFA
import Testing

@Suite struct HandleTests {
    @Test func destroyedContextsAreRecognised() throws {
        var context: UnsafeMutableRawPointer?
        #expect(mfa_create_context(&context) == MFA_SUCCESS)
        #expect(mfa_destroy_context(context) == MFA_SUCCESS)
        #expect(mfa_destroy_context(context) == MFA_ERROR_INVALID_CONTEXT)
        #expect(mfa_destroy_context(nil) == MFA_ERROR_INVALID_CONTEXT)
        var next: UnsafeMutableRawPointer?
        #expect(mfa_create_context(&next) == MFA_SUCCESS)
        #expect(next != context, "a token is not used again")
        #expect(mfa_destroy_context(next) == MFA_SUCCESS)
    }

    @Test func aBufferIsNoContextAndTheReverse() throws {
        let context = try ForeignContext()
        var buffer: OpaquePointer?
        #expect(mfa_create_buffer(context.handle, 100, &buffer) == MFA_SUCCESS)
        #expect(mfa_context_get_info(buffer, nil) == MFA_ERROR_INVALID_CONTEXT)
        #expect(mfa_destroy_context(buffer.map { UnsafeMutableRawPointer($0) }) == MFA_ERROR_INVALID_CONTEXT)
        #expect(mfa_destroy_buffer(context.handle) == MFA_ERROR_INVALID_ARGUMENT)
        #expect(mfa_buffer_size(context.handle) == 0)
        #expect(mfa_buffer_contents(context.handle) == nil)
        #expect(mfa_destroy_buffer(buffer) == MFA_SUCCESS)
        #expect(mfa_destroy_buffer(buffer) == MFA_ERROR_INVALID_ARGUMENT)
        #expect(mfa_destroy_buffer(nil) == MFA_ERROR_INVALID_ARGUMENT)
    }

    @Test func inventedHandlesAreRecognised() {
        var generator = SmallGenerator(state: 7)
        for _ in 0..<10_000 {
            let token = generator.next() | 1 << 63
            #expect(mfa_destroy_context(UnsafeMutableRawPointer(bitPattern: UInt(token))) == MFA_ERROR_INVALID_CONTEXT)
            #expect(mfa_buffer_size(OpaquePointer(bitPattern: UInt(token))) == 0)
        }
    }

    @Test func noSmallNumberIsAHandle() throws {
        let context = try ForeignContext()
        var buffer: OpaquePointer?
        #expect(mfa_create_buffer(context.handle, 16, &buffer) == MFA_SUCCESS)
        for number in Array(0..<5000) + (0..<64).map({ UInt(1) << $0 }) {
            #expect(mfa_destroy_context(UnsafeMutableRawPointer(bitPattern: number)) == MFA_ERROR_INVALID_CONTEXT)
            #expect(mfa_destroy_buffer(OpaquePointer(bitPattern: number)) == MFA_ERROR_INVALID_ARGUMENT)
        }
        #expect(mfa_destroy_buffer(buffer) == MFA_SUCCESS)
    }

    @Test func buffersOutliveTheirContext() throws {
        let allocator = CountingAllocator()
        var buffer: OpaquePointer?
        do {
            let context = try ForeignContext(allocator: allocator)
            #expect(mfa_create_buffer(context.handle, 5000, &buffer) == MFA_SUCCESS)
        }
        let contents = try #require(mfa_buffer_contents(buffer))
        #expect(mfa_buffer_size(buffer) == 5000)
        #expect(UnsafeRawBufferPointer(start: contents, count: 5000).allSatisfy { $0 == 0 })
        #expect(allocator.held == 5000)
        #expect(mfa_destroy_buffer(buffer) == MFA_SUCCESS)
        #expect(allocator.held == 0)
    }

    @Test func buffersAreChecked() throws {
        let allocator = CountingAllocator()
        let context = try ForeignContext(allocator: allocator)
        let memory = Numbers(4)
        var buffer: OpaquePointer?
        #expect(mfa_create_buffer(context.handle, -1, nil) == MFA_ERROR_INVALID_DIMENSIONS)
        #expect(mfa_create_buffer(context.handle, 1, nil) == MFA_ERROR_INVALID_ARGUMENT)
        #expect(mfa_create_buffer_from_memory(context.handle, memory.raw, -1, &buffer) == MFA_ERROR_INVALID_DIMENSIONS)
        #expect(mfa_create_buffer_from_memory(context.handle, nil, 1, &buffer) == MFA_ERROR_INVALID_ARGUMENT)
        #expect(mfa_create_buffer_from_memory(context.handle, memory.raw, 1, nil) == MFA_ERROR_INVALID_ARGUMENT)
        #expect(mfa_create_buffer_from_metal(context.handle, nil, &buffer) == MFA_ERROR_INVALID_ARGUMENT)
        #expect(mfa_create_buffer_from_metal(context.handle, memory.raw, &buffer) == MFA_ERROR_UNSUPPORTED)
        allocator.failing = allocator.allocations
        #expect(mfa_create_buffer(context.handle, 1, &buffer) == MFA_ERROR_ALLOCATION_FAILED)
        #expect(buffer == nil)
        #expect(mfa_create_buffer(context.handle, 0, &buffer) == MFA_SUCCESS)
        #expect(mfa_buffer_contents(buffer) == nil)
        #expect(mfa_destroy_buffer(buffer) == MFA_SUCCESS)
        #expect(mfa_create_buffer_from_memory(context.handle, memory.raw, 16, &buffer) == MFA_SUCCESS)
        #expect(mfa_buffer_contents(buffer) == memory.raw)
        #expect(mfa_destroy_buffer(buffer) == MFA_SUCCESS)
        #expect(memory.isUntouched)
    }

    @Test func optionsOfAContextAreChecked() {
        let size = UInt32(MemoryLayout<mfa_context_options_t>.size)
        var context: OpaquePointer?
        func create(_ change: (inout mfa_context_options_t) -> Void) -> Int32 {
            var options = mfa_context_options_t()
            options.struct_size = size
            change(&options)
            return mfa_create_context_with_options(&options, &context)
        }
        #expect(mfa_create_context(nil) == MFA_ERROR_INVALID_ARGUMENT)
        #expect(mfa_create_context_with_options(nil, nil) == MFA_ERROR_INVALID_ARGUMENT)
        #expect(create { $0.struct_size = size - 1 } == MFA_ERROR_INVALID_ARGUMENT)
        #expect(create { $0.struct_size = .max } == MFA_ERROR_UNSUPPORTED)
        #expect(create { $0.device = 4 } == MFA_ERROR_INVALID_ARGUMENT)
        #expect(create { $0.device = -1 } == MFA_ERROR_INVALID_ARGUMENT)
        #expect(create { $0.num_threads = 257 } == MFA_ERROR_INVALID_ARGUMENT)
        #expect(create { $0.reserved = 1 } == MFA_ERROR_INVALID_ARGUMENT)
        #expect(create { $0.allocate = { _, _, _ in nil } } == MFA_ERROR_INVALID_ARGUMENT)
        #expect(create { $0.device = MFA_DEVICE_METAL } == MFA_ERROR_DEVICE_UNAVAILABLE)
        #expect(context == nil, "untouched on failure")
        #expect(mfa_device_is_available(MFA_DEVICE_CPU) == 1)
        #expect(mfa_device_is_available(MFA_DEVICE_METAL) == 0)
        #expect(mfa_device_is_available(99) == 0)
    }

    @Test func infoDescribesTheContext() throws {
        let context = try ForeignContext(threads: 3)
        var info = mfa_context_info_t()
        #expect(mfa_context_get_info(context.handle, nil) == MFA_ERROR_INVALID_ARGUMENT)
        #expect(mfa_context_get_info(context.handle, &info) == MFA_ERROR_INVALID_ARGUMENT)
        info.struct_size = UInt32(MemoryLayout<mfa_context_info_t>.size)
        #expect(mfa_context_get_info(context.handle, &info) == MFA_SUCCESS)
        #expect(info.device == MFA_DEVICE_CPU)
        #expect(info.num_threads == 3)
        #expect(info.device_name.map { String(cString: $0) } == "cpu")
        #expect(info.operand_precisions == 1 << 0 | 1 << 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 8)
        #expect(info.fallback_precisions == 0)
    }

    /// A context that goes while another thread is in a call: the call ends well or is refused, and nothing is freed under it.
    @Test func destroyingWhileAnotherThreadCalls() async throws {
        for _ in 0..<20 {
            var created: UnsafeMutableRawPointer?
            try #require(mfa_create_context(&created) == MFA_SUCCESS)
            let token = UInt(bitPattern: created)
            await withTaskGroup(of: Void.self) { group in
                for seed in 0..<3 {
                    group.addTask {
                        let query = Numbers.random(64 * 8, seed: UInt64(seed))
                        let output = Numbers(64 * 8)
                        var call = FlatArguments()
                        (call.query, call.key, call.value, call.output) = (query.raw, query.raw, query.raw, output.raw)
                        (call.seqLenQ, call.seqLenKV, call.headDim) = (64, 64, 8)
                        for _ in 0..<20 {
                            let status = call.forward(UnsafeMutableRawPointer(bitPattern: token))
                            #expect(status == MFA_SUCCESS || status == MFA_ERROR_INVALID_CONTEXT)
                        }
                    }
                }
                group.addTask {
                    #expect(mfa_destroy_context(UnsafeMutableRawPointer(bitPattern: token)) == MFA_SUCCESS)
                }
            }
        }
    }
}
