/// The codes that every function of the library answers with.
public enum Status: Int32, Sendable, CaseIterable {
    case success = 0
    case invalidContext = 1
    case allocationFailed = 2
    case invalidDimensions = 3
    case executionFailed = 4
    case invalidArgument = 5
    case unsupported = 6
    case deviceUnavailable = 7
}

/// Why a call was refused or failed: a status and one line that names the argument, what was expected and what was given.
public struct MFAError: Error, Equatable, Sendable, CustomStringConvertible {
    public let status: Status
    public let message: String

    public init(_ status: Status, _ message: String) {
        self.status = status
        self.message = message
    }

    public var description: String { message }

    /// A size is illegal, or sizes disagree.
    public static func dimensions(_ message: String) -> MFAError { MFAError(.invalidDimensions, message) }

    /// An argument other than a size is illegal.
    public static func argument(_ message: String) -> MFAError { MFAError(.invalidArgument, message) }

    /// The request is legal but not served; the message names the feature.
    public static func unsupported(_ message: String) -> MFAError { MFAError(.unsupported, message) }
}
