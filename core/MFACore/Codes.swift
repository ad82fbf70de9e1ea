// The enumerations of mfa.h, with its numbers. A number that is none of them never becomes one of these values.

/// How the elements of a tensor lie in memory.
public enum Precision: Int32, Sendable, CaseIterable {
    case fp32 = 0
    case fp16 = 1
    case bf16 = 2
    case fp64 = 3
    /// Two codes a byte along the channels, the even channel in the low nibble.
    case int4 = 4
    case int8 = 8
    /// One byte, nonzero = attend. For masks.
    case bool = 16

    /// Whether elements are real numbers as they stand.
    public var isFloat: Bool {
        switch self {
        case .fp32, .fp16, .bf16, .fp64: true
        case .int4, .int8, .bool: false
        }
    }

    /// Whether elements are codes, which stand for real numbers through a scale.
    public var isQuantized: Bool { self == .int8 || self == .int4 }

    /// The bytes of one element, or of two codes of INT4.
    public var unitSize: Int {
        switch self {
        case .fp64: 8
        case .fp32: 4
        case .fp16, .bf16: 2
        case .int4, .int8, .bool: 1
        }
    }
}

/// Which elements of a quantised tensor share a scale.
public enum Granularity: Int32, Sendable, CaseIterable {
    case tensor = 0
    case head = 1
    case token = 2
    case block = 3
    case channel = 4
    case group = 5
}

/// Where query row i stands among the keys.
public enum Alignment: Int32, Sendable, CaseIterable {
    case upperLeft = 0
    case lowerRight = 1
}

/// Where a context computes.
public enum Device: Int32, Sendable, CaseIterable {
    /// The best device that is here.
    case auto = 0
    case cpu = 1
    case metal = 2
    /// The Metal kernels run in software, for tests.
    case softmetal = 3
}

/// What a kernel can be asked to do, as far as callers see.
public enum Operation: Int32, Sendable, CaseIterable {
    case forward = 0
    case backwardQuery = 1
    case backwardKeyValue = 2
}
