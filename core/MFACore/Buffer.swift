/// Memory with a size, made by a backend: views into it are checked, and a device needs no copy of it.
public final class Buffer: @unchecked Sendable {
    /// The host's address of the first byte; nil for a buffer of 0 bytes, or one that the host cannot read.
    public let contents: UnsafeMutableRawPointer?
    /// In bytes.
    public let size: Int
    /// The device's own object, where it has one.
    public let deviceObject: AnyObject?
    private let release: (@Sendable () -> Void)?

    /// A buffer whose memory `release` gives back when nobody uses it any more.
    public init(contents: UnsafeMutableRawPointer?, size: Int, deviceObject: AnyObject? = nil, release: (@Sendable () -> Void)? = nil) {
        self.contents = contents
        self.size = size
        self.deviceObject = deviceObject
        self.release = release
    }

    deinit {
        release?()
    }
}
