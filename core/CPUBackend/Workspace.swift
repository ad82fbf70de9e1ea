import MFACore

/// Memory that a context keeps between calls. It only grows.
struct Workspace {
    private let allocator: Allocator
    private(set) var memory: UnsafeMutableRawPointer?
    private(set) var size = 0

    /// Every piece starts on a cache line of its own.
    static let alignment = 64

    init(allocator: Allocator) {
        self.allocator = allocator
    }

    /// Memory of at least `size` bytes, with arbitrary contents. What was reserved before is gone.
    mutating func reserve(_ size: Int) throws(MFAError) -> UnsafeMutableRawPointer {
        if let memory, size <= self.size { return memory }
        release()
        guard let memory = allocator.allocate(max(size, Workspace.alignment), Workspace.alignment) else {
            throw MFAError(.allocationFailed, "\(size) bytes of workspace could not be had")
        }
        self.memory = memory
        self.size = max(size, Workspace.alignment)
        return memory
    }

    /// Gives the memory back.
    mutating func release() {
        guard let memory else { return }
        let size = size
        abandon()
        allocator.deallocate(memory, size, Workspace.alignment)
    }

    /// Forgets the memory without giving it back.
    mutating func abandon() {
        memory = nil
        size = 0
    }
}

/// Hands out the pieces of a workspace from its start, before or after its memory is there.
struct WorkspaceLayout {
    /// Address of the start. Any aligned address will do while only sizes are wanted.
    let base: UInt
    private(set) var size = 0

    init(base: UnsafeMutableRawPointer?) {
        // Never 0, since a piece's address of 0 would mean that it is absent; never read.
        self.base = base.map(UInt.init(bitPattern:)) ?? UInt(Workspace.alignment)
    }

    /// The next piece, of `count` times `elementSize` bytes.
    mutating func take(_ count: Int, of elementSize: Int = 1) throws(MFAError) -> UnsafeMutableRawPointer {
        let piece = UnsafeMutableRawPointer(bitPattern: base &+ UInt(size))
        let (bytes, overflow) = count.multipliedReportingOverflow(by: elementSize)
        let (end, endOverflow) = size.addingReportingOverflow(bytes)
        guard let piece, !overflow, !endOverflow else { throw WorkspaceLayout.overflow }
        size = try WorkspaceLayout.round(end)
        return piece
    }

    /// The bytes of as many whole cache lines as `size` bytes need, so that no two threads write to the same.
    static func round(_ size: Int) throws(MFAError) -> Int {
        let (end, overflow) = size.addingReportingOverflow(Workspace.alignment - 1)
        if overflow { throw WorkspaceLayout.overflow }
        return end & ~(Workspace.alignment - 1)
    }

    private static var overflow: MFAError { MFAError(.allocationFailed, "the workspace needed exceeds 2^63 - 1 bytes") }
}
