import CMFA
import MFA

@c @implementation
public func mfa_attention_initialize(_ attention: UnsafeMutablePointer<mfa_attention_t>?, _ structSize: UInt32) -> Int32 {
    withoutContext("mfa_attention_initialize") { () throws(MFAError) in
        guard let attention else { throw .argument("`attention` must not be NULL") }
        let known = MemoryLayout<mfa_attention_t>.size
        if structSize < known { throw .argument("`struct_size` must be \(known) or more (got \(structSize))") }
        var initial = mfa_attention_t()
        initial.struct_size = UInt32(known)
        initial.softmax_scale = 1
        initial.window_left = -1
        initial.window_right = -1
        attention.pointee = initial
    }
}

@c @implementation
public func mfa_attention_run_forward(_ context: OpaquePointer?, _ attention: UnsafePointer<mfa_attention_t>?) -> Int32 {
    withContext(UInt(bitPattern: context), "mfa_attention_run_forward") { (_, session) throws(MFAError) in
        try session.forward(try request(attention))
    }
}

@c @implementation
public func mfa_attention_run_backward(
    _ context: OpaquePointer?, _ attention: UnsafePointer<mfa_attention_t>?, _ gradientsAsked: UnsafePointer<mfa_attention_gradients_t>?
) -> Int32 {
    withContext(UInt(bitPattern: context), "mfa_attention_run_backward") { (_, session) throws(MFAError) in
        try session.backward(try request(attention), try gradients(gradientsAsked))
    }
}

@c @implementation
public func mfa_attention_encode_forward(
    _ context: OpaquePointer?, _ commandBuffer: UnsafeMutableRawPointer?, _ attention: UnsafePointer<mfa_attention_t>?
) -> Int32 {
    withContext(UInt(bitPattern: context), "mfa_attention_encode_forward") { (_, session) throws(MFAError) in
        try session.encode(try request(attention), into: commandBuffer)
    }
}

@c @implementation
public func mfa_attention_encode_backward(
    _ context: OpaquePointer?, _ commandBuffer: UnsafeMutableRawPointer?, _ attention: UnsafePointer<mfa_attention_t>?,
    _ gradientsAsked: UnsafePointer<mfa_attention_gradients_t>?
) -> Int32 {
    withContext(UInt(bitPattern: context), "mfa_attention_encode_backward") { (_, session) throws(MFAError) in
        try session.encode(try request(attention), try gradients(gradientsAsked), into: commandBuffer)
    }
}

@c @implementation
public func mfa_attention_workspace_size(
    _ context: OpaquePointer?, _ attention: UnsafePointer<mfa_attention_t>?,
    _ gradientsAsked: UnsafePointer<mfa_attention_gradients_t>?, _ size: UnsafeMutablePointer<UInt64>?
) -> Int32 {
    withContext(UInt(bitPattern: context), "mfa_attention_workspace_size") { (_, session) throws(MFAError) in
        var request = try request(attention)
        if size == nil { request.deferred.notePointer("`size` must not be NULL") }
        let bytes = try session.workspaceSize(request, gradientsAsked == nil ? nil : try gradients(gradientsAsked))
        size?.pointee = UInt64(clamping: bytes)
    }
}

@c @implementation
public func mfa_attention_kernel_name(
    _ context: OpaquePointer?, _ attention: UnsafePointer<mfa_attention_t>?, _ operation: Int32,
    _ name: UnsafeMutablePointer<UnsafePointer<CChar>?>?
) -> Int32 {
    withContext(UInt(bitPattern: context), "mfa_attention_kernel_name") { (_, session) throws(MFAError) in
        var request = try request(attention)
        if name == nil { request.deferred.notePointer("`name` must not be NULL") }
        let known = Operation(rawValue: operation)
        if known == nil { request.deferred.noteCode("`operation` must be one of MFA_OPERATION_* (got \(operation))") }
        let chosen = try session.kernelName(request, known ?? .forward)
        name?.pointee = chosen
    }
}

@c @implementation
public func mfa_quantize(
    _ context: OpaquePointer?, _ input: UnsafePointer<mfa_tensor_t>?, _ output: UnsafePointer<mfa_tensor_t>?
) -> Int32 {
    withContext(UInt(bitPattern: context), "mfa_quantize") { (_, session) throws(MFAError) in
        var deferred = DeferredFailures()
        let (from, to) = (tensor(input, "input", &deferred), tensor(output, "output", &deferred))
        try session.quantize(from, into: to, deferred)
    }
}

@c @implementation
public func mfa_dequantize(
    _ context: OpaquePointer?, _ input: UnsafePointer<mfa_tensor_t>?, _ output: UnsafePointer<mfa_tensor_t>?
) -> Int32 {
    withContext(UInt(bitPattern: context), "mfa_dequantize") { (_, session) throws(MFAError) in
        var deferred = DeferredFailures()
        let (from, to) = (tensor(input, "input", &deferred), tensor(output, "output", &deferred))
        try session.dequantize(from, into: to, deferred)
    }
}
