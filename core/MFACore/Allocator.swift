#if canImport(Glibc)
import Glibc
#else
import Darwin
#endif

/// Where buffers and workspace come from. Both functions are called on the thread that calls the library.
public struct Allocator: Sendable {
    /// Gives `size` bytes aligned to `alignment`, a power of two of at least 64; nil if there are none.
    public let allocate: @Sendable (_ size: Int, _ alignment: Int) -> UnsafeMutableRawPointer?
    /// Takes back what `allocate` gave, with the same size and alignment.
    public let deallocate: @Sendable (_ memory: UnsafeMutableRawPointer, _ size: Int, _ alignment: Int) -> Void

    public init(
        allocate: @escaping @Sendable (_ size: Int, _ alignment: Int) -> UnsafeMutableRawPointer?,
        deallocate: @escaping @Sendable (_ memory: UnsafeMutableRawPointer, _ size: Int, _ alignment: Int) -> Void
    ) {
        self.allocate = allocate
        self.deallocate = deallocate
    }

    /// The C library's.
    public static let system = Allocator(
        allocate: { size, alignment in
            var memory: UnsafeMutableRawPointer?
            return posix_memalign(&memory, alignment, size) == 0 ? memory : nil
        },
        deallocate: { memory, _, _ in free(memory) }
    )
}
