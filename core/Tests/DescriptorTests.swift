import CMFA
import Testing

/// What the general functions refuse, with which status, in which order.
@Suite struct DescriptorTests {
    /// A general call, with legal arguments to begin with: batch 2, 4 query heads on 2 key/value heads, 3 rows, 5 columns, 8 channels.
    private final class Call {
        static let sizes = (batch: 2, heads: 4, kvHeads: 2, rows: 3, columns: 5, channels: 8)
        let context: ForeignContext
        let operands = (
            query: Numbers.random(2 * 4 * 3 * 8, seed: 1), key: Numbers.random(2 * 2 * 5 * 8, seed: 2),
            value: Numbers.random(2 * 2 * 5 * 8, seed: 3)
        )
        let output = Numbers(2 * 4 * 3 * 8)
        let logsumexp = Numbers(2 * 4 * 3)
        let gradQuery = Numbers(2 * 4 * 3 * 8)
        let arrays = UnsafeMutablePointer<Int64>.allocate(capacity: 4)
        let scales = Numbers(2 * 2 * 5) { _ in 0.5 }
        // Descriptors at fixed addresses: query, key, value, output, mask, grad_output, grad_query, spare.
        let tensors = UnsafeMutablePointer<mfa_tensor_t>.allocate(capacity: 8)
        let quantization = UnsafeMutablePointer<mfa_quantization_t>.allocate(capacity: 1)
        let scheme = UnsafeMutablePointer<mfa_quantization_scheme_t>.allocate(capacity: 1)
        var attention = mfa_attention_t()
        var gradients = mfa_attention_gradients_t()

        init() throws {
            context = try ForeignContext()
            arrays.initialize(repeating: 0, count: 4)
            let (batch, heads, kvHeads, rows, columns, channels) = Call.sizes
            func tensor(_ numbers: Numbers, _ heads: Int, _ tokens: Int) -> mfa_tensor_t {
                var tensor = mfa_tensor_t()
                tensor.struct_size = UInt32(MemoryLayout<mfa_tensor_t>.size)
                tensor.precision = MFA_PRECISION_FP32
                tensor.data = numbers.raw
                tensor.shape = (Int64(batch), Int64(heads), Int64(tokens), Int64(channels))
                tensor.strides = (Int64(heads * tokens * channels), Int64(tokens * channels), Int64(channels), 1)
                return tensor
            }
            let list = [
                tensor(operands.query, heads, rows), tensor(operands.key, kvHeads, columns), tensor(operands.value, kvHeads, columns),
                tensor(output, heads, rows), tensor(operands.query, heads, rows), tensor(operands.query, heads, rows),
                tensor(gradQuery, heads, rows), tensor(output, heads, rows),
            ]
            for (index, tensor) in list.enumerated() { (tensors + index).initialize(to: tensor) }
            // The mask: one row of columns for everything.
            tensors[4].shape = (1, 1, 1, Int64(columns))
            tensors[4].strides = (0, 0, 0, 1)
            quantization.initialize(to: mfa_quantization_t())
            quantization.pointee.struct_size = UInt32(MemoryLayout<mfa_quantization_t>.size)
            quantization.pointee.granularity = MFA_GRANULARITY_TOKEN
            quantization.pointee.scales = scales.pointer
            scheme.initialize(to: mfa_quantization_scheme_t())
            scheme.pointee.struct_size = UInt32(MemoryLayout<mfa_quantization_scheme_t>.size)
            scheme.pointee.precision = MFA_PRECISION_INT8
            _ = mfa_attention_initialize(&attention, UInt32(MemoryLayout<mfa_attention_t>.size))
            attention.query = UnsafePointer(tensors)
            attention.key = UnsafePointer(tensors + 1)
            attention.value = UnsafePointer(tensors + 2)
            attention.output = UnsafePointer(tensors + 3)
            attention.logsumexp = logsumexp.raw
            gradients.struct_size = UInt32(MemoryLayout<mfa_attention_gradients_t>.size)
            gradients.grad_output = UnsafePointer(tensors + 5)
            gradients.grad_query = UnsafePointer(tensors + 6)
        }

        deinit {
            arrays.deallocate()
            tensors.deallocate()
            quantization.deallocate()
            scheme.deallocate()
        }

        /// Makes the keys codes with scales.
        func quantizeKey() {
            tensors[1].precision = MFA_PRECISION_INT8
            tensors[1].quantization = UnsafePointer(quantization)
        }

        func forward() -> Int32 { mfa_attention_run_forward(context.handle, &attention) }
        func backward() -> Int32 { mfa_attention_run_backward(context.handle, &attention, &gradients) }
    }

    /// Expects a status of a forward call after a change, and that nothing was written.
    private func expect(
        _ status: Int32, _ words: String, location: SourceLocation = #_sourceLocation, _ change: (Call) -> Void
    ) throws {
        let call = try Call()
        change(call)
        #expect(call.forward() == status, "\(call.context.lastError)", sourceLocation: location)
        #expect(call.context.lastError.contains(words), "\(call.context.lastError)", sourceLocation: location)
        if status != MFA_SUCCESS { #expect(call.output.isUntouched && call.logsumexp.isUntouched, sourceLocation: location) }
    }

    private func expectBackward(
        _ status: Int32, _ words: String, location: SourceLocation = #_sourceLocation, _ change: (Call) -> Void
    ) throws {
        let call = try Call()
        #expect(call.forward() == MFA_SUCCESS)
        change(call)
        #expect(call.backward() == status, "\(call.context.lastError)", sourceLocation: location)
        #expect(call.context.lastError.contains(words), "\(call.context.lastError)", sourceLocation: location)
        if status != MFA_SUCCESS { #expect(call.gradQuery.isUntouched, sourceLocation: location) }
    }

    @Test func legalCallsSucceed() throws {
        try expect(MFA_SUCCESS, "") { _ in }
        try expect(MFA_SUCCESS, "") { $0.quantizeKey() }
        try expect(MFA_SUCCESS, "") { $0.attention.mask = UnsafePointer($0.tensors + 4) }
        try expectBackward(MFA_SUCCESS, "") { _ in }
        try expectBackward(MFA_SUCCESS, "") { $0.attention.output = nil }
    }

    @Test func descriptorsAreSized() throws {
        let size = UInt32(MemoryLayout<mfa_attention_t>.size)
        try expect(MFA_ERROR_INVALID_ARGUMENT, "struct_size") { $0.attention.struct_size = size - 1 }
        try expect(MFA_ERROR_UNSUPPORTED, "does not know") { $0.attention.struct_size = .max }
        try expect(MFA_ERROR_INVALID_ARGUMENT, "struct_size") { $0.tensors[1].struct_size = 0 }
        try expect(MFA_ERROR_INVALID_ARGUMENT, "struct_size") {
            $0.quantizeKey()
            $0.quantization.pointee.struct_size = 4
        }
        try expect(MFA_ERROR_INVALID_DIMENSIONS, "num_heads") {
            $0.tensors[1].struct_size = 0
            $0.tensors[0].shape.1 = 0
        }
        let call = try Call()
        #expect(mfa_attention_run_forward(call.context.handle, nil) == MFA_ERROR_INVALID_ARGUMENT)
        #expect(mfa_attention_initialize(nil, size) == MFA_ERROR_INVALID_ARGUMENT)
        #expect(mfa_attention_initialize(&call.attention, size - 1) == MFA_ERROR_INVALID_ARGUMENT)
        #expect(mfa_attention_initialize(&call.attention, size + 100) == MFA_SUCCESS)
        #expect(call.attention.struct_size == size)
    }

    @Test(arguments: [UInt8(0), 1]) func longerDescriptorsAreReadWhereTheRestIsZero(rest: UInt8) throws {
        let call = try Call()
        let size = MemoryLayout<mfa_attention_t>.size
        let memory = UnsafeMutableRawPointer.allocate(byteCount: size + 64, alignment: 8)
        defer { memory.deallocate() }
        memory.initializeMemory(as: UInt8.self, repeating: 0, count: size + 64)
        call.attention.struct_size = UInt32(size + 64)
        memory.copyMemory(from: &call.attention, byteCount: size)
        memory.storeBytes(of: rest, toByteOffset: size + 63, as: UInt8.self)
        let status = mfa_attention_run_forward(call.context.handle, memory.assumingMemoryBound(to: mfa_attention_t.self))
        #expect(status == (rest == 0 ? MFA_SUCCESS : MFA_ERROR_UNSUPPORTED))
    }

    @Test func sizesAgree() throws {
        for tensor in 0..<4 {
            for axis in 0..<4 {
                try expect(MFA_ERROR_INVALID_DIMENSIONS, "`") { call in
                    withUnsafeMutableBytes(of: &call.tensors[tensor].shape) { $0.bindMemory(to: Int64.self)[axis] += 1 }
                }
            }
        }
        for size in [-1, Int64.min, 1 << 32, Int64.max] {
            try expect(MFA_ERROR_INVALID_DIMENSIONS, "`query`") { $0.tensors[0].shape.0 = size }
        }
        try expect(MFA_ERROR_INVALID_DIMENSIONS, "`key`") { $0.tensors[1].strides.0 = .max }
        try expect(MFA_ERROR_INVALID_DIMENSIONS, "`key`") { $0.tensors[1].strides.2 = .min }
        try expect(MFA_ERROR_INVALID_DIMENSIONS, "wraps") { $0.tensors[1].data = UnsafeMutableRawPointer(bitPattern: UInt.max - 3) }
        try expect(MFA_ERROR_INVALID_DIMENSIONS, "`mask`") {
            $0.attention.mask = UnsafePointer($0.tensors + 4)
            $0.tensors[4].shape.3 = 4
        }
        try expect(MFA_ERROR_INVALID_DIMENSIONS, "num_query_offsets") {
            $0.attention.query_offsets = UnsafePointer($0.arrays)
            $0.attention.num_query_offsets = 3
        }
        try expect(MFA_ERROR_INVALID_DIMENSIONS, "block_size") {
            $0.quantizeKey()
            $0.quantization.pointee.granularity = MFA_GRANULARITY_BLOCK
        }
        try expectBackward(MFA_ERROR_INVALID_DIMENSIONS, "`grad_query`") { $0.tensors[6].shape.2 = 2 }
    }

    @Test func codesAndFlags() throws {
        try expect(MFA_ERROR_INVALID_ARGUMENT, "`query`") { $0.tensors[0].precision = 99 }
        try expect(MFA_ERROR_INVALID_ARGUMENT, "`query`") { $0.tensors[0].precision = MFA_PRECISION_BOOL }
        try expect(MFA_ERROR_INVALID_ARGUMENT, "`output`") { $0.tensors[3].precision = MFA_PRECISION_INT8 }
        try expect(MFA_ERROR_INVALID_ARGUMENT, "`causal`") { $0.attention.causal = 2 }
        try expect(MFA_ERROR_INVALID_ARGUMENT, "`alignment`") { $0.attention.alignment = -1 }
        try expect(MFA_ERROR_INVALID_ARGUMENT, "`reserved`") { $0.attention.reserved = 1 }
        try expect(MFA_ERROR_INVALID_ARGUMENT, "granularity") {
            $0.quantizeKey()
            $0.quantization.pointee.granularity = 6
        }
        try expect(MFA_ERROR_INVALID_ARGUMENT, "rotation") {
            $0.quantizeKey()
            $0.quantization.pointee.rotated = 1
        }
        try expect(MFA_ERROR_INVALID_ARGUMENT, "smoothed") {
            $0.attention.quantize_query = UnsafePointer($0.scheme)
            $0.scheme.pointee.smooth = 1
        }
        try expect(MFA_ERROR_INVALID_ARGUMENT, "rotated") {
            $0.attention.quantize_value = UnsafePointer($0.scheme)
            $0.scheme.pointee.rotate = 1
        }
        try expect(MFA_ERROR_INVALID_ARGUMENT, "`quantize_key`") {
            $0.quantizeKey()
            $0.attention.quantize_key = UnsafePointer($0.scheme)
        }
        try expect(MFA_ERROR_INVALID_ARGUMENT, "even") {
            $0.tensors[1].precision = MFA_PRECISION_INT4
            $0.tensors[1].strides.2 = 7
        }
        try expect(MFA_ERROR_INVALID_ARGUMENT, "`alignment`") {
            $0.attention.query_offsets = UnsafePointer($0.arrays)
            $0.attention.num_query_offsets = 1
            $0.attention.alignment = MFA_ALIGNMENT_LOWER_RIGHT
        }
        try expectBackward(MFA_ERROR_INVALID_ARGUMENT, "`grad_query`") { $0.tensors[6].precision = MFA_PRECISION_INT8 }
        try expectBackward(MFA_ERROR_INVALID_ARGUMENT, "`grad_mask`") { $0.gradients.grad_mask = UnsafePointer($0.tensors + 6) }
        try expectBackward(MFA_ERROR_INVALID_ARGUMENT, "`grad_sinks`") { $0.gradients.grad_sinks = $0.gradQuery.raw }
        try expectBackward(MFA_ERROR_INVALID_ARGUMENT, "`grad_alibi_slopes`") { $0.gradients.grad_alibi_slopes = $0.gradQuery.raw }
        try expectBackward(MFA_ERROR_INVALID_ARGUMENT, "`d_values_given`") {
            $0.gradients.d_values_given = -1
            $0.gradients.d_values = $0.logsumexp.raw
        }
    }

    @Test func scalars() throws {
        for scale in [Double.nan, .infinity] {
            try expect(MFA_ERROR_INVALID_ARGUMENT, "`softmax_scale`") { $0.attention.softmax_scale = scale }
        }
        for softcap in [Double.nan, .infinity, -1] {
            try expect(MFA_ERROR_INVALID_ARGUMENT, "`softcap`") { $0.attention.softcap = softcap }
        }
        for p in [Double.nan, -0.1, 1.1] { try expect(MFA_ERROR_INVALID_ARGUMENT, "`dropout_p`") { $0.attention.dropout_p = p } }
        for window in [Int64(-2), .min] {
            try expect(MFA_ERROR_INVALID_ARGUMENT, "`window_left`") { $0.attention.window_left = window }
            try expect(MFA_ERROR_INVALID_ARGUMENT, "`window_right`") { $0.attention.window_right = window }
        }
        try expect(MFA_SUCCESS, "") { ($0.attention.window_left, $0.attention.window_right) = (.max, .max) }
        for offset in [Int64(1) << 61, -(1 << 61), .min, .max] {
            try expect(MFA_ERROR_INVALID_ARGUMENT, "`query_offsets`") {
                $0.arrays[1] = offset
                $0.attention.query_offsets = UnsafePointer($0.arrays)
                $0.attention.num_query_offsets = 2
            }
        }
    }

    @Test func lengthsComeBeforeScalesAndScalesBeforeOverlap() throws {
        for length in [Int64(-1), 6, .min, .max] {
            try expect(MFA_ERROR_INVALID_DIMENSIONS, "`kv_lengths`") {
                $0.arrays[1] = length
                $0.attention.kv_lengths = UnsafePointer($0.arrays)
                $0.quantizeKey()
                $0.scales.pointer[0] = 0
                $0.tensors[3].data = $0.operands.query.raw
            }
        }
        for scale in [Float(0), -1, .nan, .infinity] {
            try expect(MFA_ERROR_INVALID_ARGUMENT, "scales") {
                $0.quantizeKey()
                $0.scales.pointer[19] = scale
                $0.tensors[3].data = $0.operands.query.raw
            }
        }
    }

    @Test func scalesBeyondLengthsAreNotRead() throws {
        // Of 2 sequences of 2 heads of 5 tokens, 3 and 0 tokens are used.
        func prepare(_ call: Call) {
            (call.arrays[0], call.arrays[1]) = (3, 0)
            call.attention.kv_lengths = UnsafePointer(call.arrays)
            call.quantizeKey()
            for index in 0..<20 where index % 5 >= 3 || index >= 10 { call.scales.pointer[index] = .nan }
        }
        try expect(MFA_SUCCESS, "", prepare)
        try expect(MFA_ERROR_INVALID_ARGUMENT, "scales") {
            prepare($0)
            $0.scales.pointer[7] = .nan
        }
    }

    @Test func outputsOverlapNothing() throws {
        try expect(MFA_ERROR_INVALID_ARGUMENT, "`output`") { $0.tensors[3].strides.1 = 0 }
        try expect(MFA_ERROR_INVALID_ARGUMENT, "`key.scales`") {
            $0.quantizeKey()
            $0.tensors[3].data = $0.scales.raw
        }
        try expectBackward(MFA_ERROR_INVALID_ARGUMENT, "`grad_query`") { $0.gradients.d_values = $0.gradQuery.raw }
        try expectBackward(MFA_ERROR_INVALID_ARGUMENT, "`grad_key`") {
            $0.tensors[7] = $0.tensors[1]
            $0.tensors[7].data = $0.gradQuery.raw
            $0.gradients.grad_key = UnsafePointer($0.tensors + 7)
        }
    }

    /// Without columns a mask has no elements, nor has its gradient, whatever its strides are.
    @Test func gradientsWithoutElementsAreNotTouched() throws {
        try expectBackward(MFA_SUCCESS, "") {
            $0.tensors[1].shape.2 = 0
            $0.tensors[2].shape.2 = 0
            $0.tensors[4].shape = (1, 4, 3, 0)
            $0.tensors[7] = $0.tensors[4]
            $0.tensors[7].strides = (1 << 40, 1 << 40, 1 << 40, 1)
            $0.attention.mask = UnsafePointer($0.tensors + 4)
            $0.gradients.grad_mask = UnsafePointer($0.tensors + 7)
        }
    }

    @Test func buffersStandForAddresses() throws {
        let call = try Call()
        var buffer: OpaquePointer?
        let bytes = call.output.count * 4
        #expect(mfa_create_buffer_from_memory(call.context.handle, call.output.raw, bytes, &buffer) == MFA_SUCCESS)
        call.tensors[3].buffer = buffer
        #expect(call.forward() == MFA_ERROR_INVALID_ARGUMENT, "data and buffer")
        call.tensors[3].data = nil
        call.tensors[3].buffer_offset = 4
        #expect(call.forward() == MFA_ERROR_INVALID_DIMENSIONS, "beyond the end")
        call.tensors[3].buffer_offset = .max
        #expect(call.forward() == MFA_ERROR_INVALID_DIMENSIONS)
        #expect(call.output.isUntouched)
        call.tensors[3].buffer_offset = 0
        #expect(call.forward() == MFA_SUCCESS)
        #expect(!call.output.isUntouched)
        #expect(mfa_destroy_buffer(buffer) == MFA_SUCCESS)
        #expect(call.forward() == MFA_ERROR_INVALID_ARGUMENT, "destroyed")
        call.tensors[3].buffer = call.context.handle
        #expect(call.forward() == MFA_ERROR_INVALID_ARGUMENT, "not a buffer")
    }

    @Test func inquiries() throws {
        let call = try Call()
        let handle = call.context.handle
        var size: UInt64 = 0
        #expect(mfa_attention_workspace_size(handle, &call.attention, nil, &size) == MFA_SUCCESS)
        #expect(size > 0)
        #expect(mfa_attention_workspace_size(handle, &call.attention, &call.gradients, nil) == MFA_ERROR_INVALID_ARGUMENT)
        var name: UnsafePointer<CChar>?
        for operation in 0...2 as ClosedRange<Int32> {
            #expect(mfa_attention_kernel_name(handle, &call.attention, operation, &name) == MFA_SUCCESS)
            let expected = operation == 0 ? ["attention_forward_", "attention_decode_"] : ["attention_backward_"]
            #expect(expected.contains { prefix in name.map { String(cString: $0) }?.hasPrefix(prefix) == true })
        }
        #expect(mfa_attention_kernel_name(handle, &call.attention, 3, &name) == MFA_ERROR_INVALID_ARGUMENT)
        #expect(mfa_attention_kernel_name(handle, &call.attention, 0, nil) == MFA_ERROR_INVALID_ARGUMENT)
        call.attention.output = nil
        #expect(mfa_attention_kernel_name(handle, &call.attention, MFA_OPERATION_BACKWARD_QUERY, &name) == MFA_SUCCESS)
        #expect(mfa_attention_kernel_name(handle, &call.attention, MFA_OPERATION_FORWARD, &name) == MFA_ERROR_INVALID_ARGUMENT)
        #expect(call.output.isUntouched)
    }

    @Test func encodingNeedsMetal() throws {
        let call = try Call()
        let handle = call.context.handle
        #expect(mfa_attention_encode_forward(handle, nil, &call.attention) == MFA_ERROR_INVALID_ARGUMENT)
        #expect(mfa_attention_encode_forward(handle, call.output.raw, nil) == MFA_ERROR_INVALID_ARGUMENT)
        #expect(mfa_attention_encode_forward(handle, call.output.raw, &call.attention) == MFA_ERROR_UNSUPPORTED)
        #expect(mfa_attention_encode_backward(handle, call.output.raw, &call.attention, &call.gradients) == MFA_ERROR_UNSUPPORTED)
        call.tensors[0].shape.1 = 3
        #expect(mfa_attention_encode_forward(handle, nil, &call.attention) == MFA_ERROR_INVALID_DIMENSIONS)
    }

    @Test func quantisingAndDequantising() throws {
        let call = try Call()
        let handle = call.context.handle
        let codes = Numbers(2 * 2 * 5 * 8 / 4)
        let scales = Numbers(20)
        var output = call.tensors[1]
        output.data = codes.raw
        output.precision = MFA_PRECISION_INT8
        #expect(mfa_quantize(handle, call.tensors + 1, &output) == MFA_ERROR_INVALID_ARGUMENT, "no scheme")
        call.quantization.pointee.scales = scales.pointer
        output.quantization = UnsafePointer(call.quantization)
        #expect(mfa_quantize(handle, nil, &output) == MFA_ERROR_INVALID_ARGUMENT)
        #expect(mfa_quantize(handle, &output, &output) == MFA_ERROR_INVALID_ARGUMENT)
        #expect(mfa_quantize(handle, call.tensors, &output) == MFA_ERROR_INVALID_DIMENSIONS)
        call.operands.key.pointer[3] = .infinity
        #expect(mfa_quantize(handle, call.tensors + 1, &output) == MFA_ERROR_INVALID_ARGUMENT)
        #expect(codes.isUntouched && scales.isUntouched)
        call.operands.key.pointer[3] = 0.25
        call.quantization.pointee.scales = call.operands.key.pointer
        #expect(mfa_quantize(handle, call.tensors + 1, &output) == MFA_ERROR_INVALID_ARGUMENT, "scales over the input")
        call.quantization.pointee.scales = scales.pointer
        #expect(mfa_quantize(handle, call.tensors + 1, &output) == MFA_SUCCESS)
        #expect(scales.values.allSatisfy { $0 > 0 && $0 < 1 })
        var back = call.tensors[1]
        let numbers = Numbers(2 * 2 * 5 * 8)
        back.data = numbers.raw
        scales.pointer[2] = -1
        #expect(mfa_dequantize(handle, &output, &back) == MFA_ERROR_INVALID_ARGUMENT)
        #expect(numbers.isUntouched)
        scales.pointer[2] = 1
        #expect(mfa_dequantize(handle, &output, &back) == MFA_SUCCESS)
        // No tokens: no elements, but one scale, that of values which do not exist.
        call.quantization.pointee.granularity = MFA_GRANULARITY_TENSOR
        var (empty, emptyCodes) = (call.tensors[1], output)
        (empty.shape.2, empty.data, emptyCodes.shape.2, emptyCodes.data) = (0, nil, 0, nil)
        #expect(mfa_quantize(handle, &empty, &emptyCodes) == MFA_SUCCESS)
        #expect(scales.values[0] == 1)
    }
}
