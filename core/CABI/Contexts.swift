import CMFA
import MFA
import Support

@c @implementation
public func mfa_create_context(_ context: UnsafeMutablePointer<UnsafeMutableRawPointer?>?) -> Int32 {
    withoutContext("mfa_create_context") { () throws(MFAError) in
        guard let context else { throw .argument("`context` must not be NULL") }
        context.pointee = UnsafeMutableRawPointer(bitPattern: try createContext(nil))
    }
}

@c @implementation
public func mfa_create_context_with_options(
    _ options: UnsafePointer<mfa_context_options_t>?, _ context: UnsafeMutablePointer<OpaquePointer?>?
) -> Int32 {
    withoutContext("mfa_create_context_with_options") { () throws(MFAError) in
        guard let context else { throw .argument("`context` must not be NULL") }
        context.pointee = OpaquePointer(bitPattern: try createContext(options))
    }
}

@c @implementation
public func mfa_destroy_context(_ context: UnsafeMutableRawPointer?) -> Int32 {
    let token = UInt(bitPattern: context)
    return withoutContext("mfa_destroy_context") { () throws(MFAError) in
        guard let object = handles.remove(token, .context) else { throw invalidContext(token) }
        // Whoever is in a call holds a reference of his own; wait for him, as the header promises.
        unsafeDowncast(object, to: ContextEntry.self).context.exclusively { _ in }
    }
}

@c @implementation
public func mfa_context_get_info(_ context: OpaquePointer?, _ info: UnsafeMutablePointer<mfa_context_info_t>?) -> Int32 {
    withContext(UInt(bitPattern: context), "mfa_context_get_info") { (entry, session) throws(MFAError) in
        guard let info else { throw .argument("`info` must not be NULL") }
        let known = MemoryLayout<mfa_context_info_t>.size
        // The first version ended before this field.
        let least = MemoryLayout<mfa_context_info_t>.offset(of: \.gpu_seconds) ?? known
        let given = UnsafeRawPointer(info).loadUnaligned(as: UInt32.self)
        if given < least { throw .argument("`info`: `struct_size` must be \(least) or more (got \(given))") }
        let described = entry.context.info
        var filled = mfa_context_info_t()
        filled.struct_size = given
        filled.device = entry.context.device.rawValue
        filled.num_threads = UInt32(clamping: described.numThreads)
        filled.device_name = cString(described.name)
        filled.instruction_set = cString(described.instructionSet)
        filled.operand_precisions = described.operandPrecisions.reduce(0) { $0 | 1 << UInt64($1.rawValue) }
        filled.fallback_precisions = described.fallbackPrecisions.reduce(0) { $0 | 1 << UInt64($1.rawValue) }
        filled.workspace_bytes = UInt64(clamping: session.heldWorkspace)
        filled.gpu_seconds = session.deviceSeconds
        withUnsafeBytes(of: filled) {
            UnsafeMutableRawPointer(info).copyMemory(from: $0.baseAddress ?? UnsafeRawPointer(info), byteCount: min(known, Int(given)))
        }
    }
}

@c @implementation
public func mfa_device_is_available(_ device: Int32) -> Int32 {
    Device(rawValue: device)?.isAvailable == true ? 1 : 0
}

@c @implementation
public func mfa_last_error(_ context: OpaquePointer?) -> UnsafePointer<CChar>? {
    guard let entry = findContext(UInt(bitPattern: context)) else { return UnsafePointer(support_thread_message()) }
    return UnsafePointer(entry.message)
}

@c @implementation
public func mfa_status_string(_ status: Int32) -> UnsafePointer<CChar>? {
    switch Status(rawValue: status) {
    case .success: cString("success")
    case .invalidContext: cString("invalid context")
    case .allocationFailed: cString("allocation failed")
    case .invalidDimensions: cString("invalid dimensions")
    case .executionFailed: cString("execution failed")
    case .invalidArgument: cString("invalid argument")
    case .unsupported: cString("unsupported")
    case .deviceUnavailable: cString("device unavailable")
    case nil: cString("unknown status")
    }
}

@c @implementation
public func mfa_version() -> UInt32 {
    UInt32(MFA_VERSION_MAJOR * 10000 + MFA_VERSION_MINOR * 100 + MFA_VERSION_PATCH)
}

@c @implementation
public func mfa_version_string() -> UnsafePointer<CChar>? {
    versionString
}

/// Made once, and there as long as the process.
nonisolated(unsafe) private let versionString: UnsafePointer<CChar> = {
    let text = "\(MFA_VERSION_MAJOR).\(MFA_VERSION_MINOR).\(MFA_VERSION_PATCH)".utf8CString
    let copy = UnsafeMutablePointer<CChar>.allocate(capacity: text.count)
    for (index, character) in text.enumerated() { (copy + index).initialize(to: character) }
    return UnsafePointer(copy)
}()

/// A literal as C sees it: literals end with a 0 and live as long as the process.
private func cString(_ literal: StaticString) -> UnsafePointer<CChar> {
    UnsafeRawPointer(literal.utf8Start).assumingMemoryBound(to: CChar.self)
}

/// An allocator of C functions.
private struct ForeignAllocator: @unchecked Sendable {
    let allocate: @convention(c) (UnsafeMutableRawPointer?, Int, Int) -> UnsafeMutableRawPointer?
    let deallocate: @convention(c) (UnsafeMutableRawPointer?, UnsafeMutableRawPointer?, Int, Int) -> Void
    let state: UnsafeMutableRawPointer?

    var allocator: Allocator {
        Allocator(
            allocate: { size, alignment in self.allocate(self.state, size, alignment) },
            deallocate: { memory, size, alignment in self.deallocate(self.state, memory, size, alignment) })
    }
}

/// Creates a context and gives its token.
private func createContext(_ options: UnsafePointer<mfa_context_options_t>?) throws(MFAError) -> UInt {
    var device = Device.auto
    var threads = 0
    var allocator = Allocator.system
    if let options {
        var deferred = DeferredFailures()
        let given = read(options, mfa_context_options_t(), "options", &deferred)
        try deferred.throwPointers()
        guard let given else { throw .argument("`options` cannot be read") }
        guard let known = Device(rawValue: given.device) else {
            throw .argument("`device` must be one of MFA_DEVICE_* (got \(given.device))")
        }
        if given.num_threads > Context.mostThreads {
            throw .argument("`num_threads` must be 0 to \(Context.mostThreads) (got \(given.num_threads))")
        }
        reserved(Int64(given.reserved), "options", &deferred)
        try deferred.throwCodes()
        switch (given.allocate, given.deallocate) {
        case (nil, nil):
            break
        case (let allocate?, let deallocate?):
            allocator = ForeignAllocator(allocate: allocate, deallocate: deallocate, state: given.allocator_state).allocator
        default:
            throw .argument("`allocate` and `deallocate` must both be given, or neither")
        }
        try deferred.throwUnsupported()
        device = known
        threads = Int(given.num_threads)
    }
    let entry = ContextEntry(try Context(device: device, threads: threads, allocator: allocator))
    let token = handles.insert(entry, .context)
    if token == 0 { throw MFAError(.allocationFailed, "there are too many handles") }
    return token
}
