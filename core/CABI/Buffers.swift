import CMFA
import MFA

@c @implementation
public func mfa_create_buffer(_ context: OpaquePointer?, _ size: Int, _ buffer: UnsafeMutablePointer<OpaquePointer?>?) -> Int32 {
    withContext(UInt(bitPattern: context), "mfa_create_buffer") { (_, session) throws(MFAError) in
        if size < 0 { throw .dimensions("`size` must be 0 to 2^63 - 1 (got \(UInt(bitPattern: size)))") }
        guard let buffer else { throw .argument("`buffer` must not be NULL") }
        buffer.pointee = try handle(try session.makeBuffer(size: size))
    }
}

@c @implementation
public func mfa_create_buffer_from_memory(
    _ context: OpaquePointer?, _ memory: UnsafeMutableRawPointer?, _ size: Int, _ buffer: UnsafeMutablePointer<OpaquePointer?>?
) -> Int32 {
    withContext(UInt(bitPattern: context), "mfa_create_buffer_from_memory") { (_, session) throws(MFAError) in
        let wrapped = try session.wrap(memory, size: size)
        guard let buffer else { throw .argument("`buffer` must not be NULL") }
        buffer.pointee = try handle(wrapped)
    }
}

@c @implementation
public func mfa_create_buffer_from_metal(
    _ context: OpaquePointer?, _ metalBuffer: UnsafeMutableRawPointer?, _ buffer: UnsafeMutablePointer<OpaquePointer?>?
) -> Int32 {
    withContext(UInt(bitPattern: context), "mfa_create_buffer_from_metal") { (_, session) throws(MFAError) in
        guard let metalBuffer else { throw .argument("`metal_buffer` must not be NULL") }
        guard let buffer else { throw .argument("`buffer` must not be NULL") }
        buffer.pointee = try handle(try session.wrap(deviceBuffer: metalBuffer))
    }
}

@c @implementation
public func mfa_buffer_contents(_ buffer: OpaquePointer?) -> UnsafeMutableRawPointer? {
    find(buffer)?.contents
}

@c @implementation
public func mfa_buffer_size(_ buffer: OpaquePointer?) -> Int {
    find(buffer)?.size ?? 0
}

@c @implementation
public func mfa_destroy_buffer(_ buffer: OpaquePointer?) -> Int32 {
    withoutContext("mfa_destroy_buffer") { () throws(MFAError) in
        if handles.remove(UInt(bitPattern: buffer), .buffer) == nil {
            throw .argument(buffer == nil ? "`buffer` must not be NULL" : "`buffer` is destroyed or is not a buffer")
        }
    }
}

/// The buffer of a handle, nil if it is none.
private func find(_ handle: OpaquePointer?) -> Buffer? {
    handles.find(UInt(bitPattern: handle), .buffer).map { unsafeDowncast($0, to: Buffer.self) }
}

/// A handle for a buffer.
private func handle(_ buffer: Buffer) throws(MFAError) -> OpaquePointer {
    guard let handle = OpaquePointer(bitPattern: handles.insert(buffer, .buffer)) else {
        throw MFAError(.allocationFailed, "there are too many handles")
    }
    return handle
}
