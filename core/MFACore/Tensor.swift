/// Sizes in the order batch, head, token, channel; of a mask: batch, query head, query row, key column.
public typealias Shape = SIMD4<Int>
/// Distances between neighbours, in elements (codes for INT4), in the order of `Shape`.
public typealias Strides = SIMD4<Int>

/// How a contiguous tensor lies in memory.
public enum Layout: Sendable {
    /// [batch, head, token, channel]: PyTorch's.
    case bhsd
    /// [batch, token, head, channel]: FlashAttention's and that of the flat C functions.
    case bshd
    /// [batch, head, channel, token]: the flat functions' transposed operands.
    case bhds

    /// The strides of a contiguous tensor. Of sizes whose product overflows they mean nothing; such a tensor is refused, or has no element.
    public func strides(shape: Shape, precision: Precision) -> Strides {
        // A row of INT4 codes, along the channels wherever they are, is padded to whole bytes.
        let padded = precision == .int4 ? shape[3] &+ (shape[3] & 1) : shape[3]
        switch self {
        case .bhsd:
            let head = shape[2] &* padded
            return Strides(shape[1] &* head, head, padded, 1)
        case .bshd:
            let token = shape[1] &* padded
            return Strides(shape[2] &* token, padded, token, 1)
        case .bhds:
            let head = padded &* shape[2]
            return Strides(shape[1] &* head, head, precision == .int4 ? 2 : 1, shape[2])
        }
    }
}

/// How codes stand for real numbers: scale * (code - zero point) [+ channel mean] [then the rotation undone].
public struct Quantization {
    public var granularity: Granularity
    /// Tokens that share a scale, for `Granularity.block`.
    public var blockSize: Int
    /// Channels that share a scale, for `Granularity.group`.
    public var groupSize: Int
    /// Whether the codes are those of the Walsh-Hadamard transform of each row.
    public var rotated: Bool
    public var scales: UnsafeMutablePointer<Float>?
    /// Nil: all 0 (symmetric).
    public var zeroPoints: UnsafeMutablePointer<Int32>?
    /// Nil: no smoothing.
    public var channelMeans: UnsafeMutablePointer<Float>?

    public init(
        granularity: Granularity = .tensor, blockSize: Int = 0, groupSize: Int = 0, rotated: Bool = false,
        scales: UnsafeMutablePointer<Float>?, zeroPoints: UnsafeMutablePointer<Int32>? = nil,
        channelMeans: UnsafeMutablePointer<Float>? = nil
    ) {
        self.granularity = granularity
        self.blockSize = blockSize
        self.groupSize = groupSize
        self.rotated = rotated
        self.scales = scales
        self.zeroPoints = zeroPoints
        self.channelMeans = channelMeans
    }
}

/// How float operands are quantised on the way into attention.
public struct QuantizationScheme: Sendable {
    /// `Precision.int8` or `Precision.int4`.
    public var precision: Precision
    public var granularity: Granularity
    public var blockSize: Int
    public var groupSize: Int
    /// With zero points.
    public var asymmetric: Bool
    /// Each channel's mean is subtracted first. Keys only.
    public var smooth: Bool
    /// Walsh-Hadamard transform first. Query and key alike.
    public var rotate: Bool

    public init(
        precision: Precision = .int8, granularity: Granularity = .token, blockSize: Int = 0, groupSize: Int = 0,
        asymmetric: Bool = false, smooth: Bool = false, rotate: Bool = false
    ) {
        self.precision = precision
        self.granularity = granularity
        self.blockSize = blockSize
        self.groupSize = groupSize
        self.asymmetric = asymmetric
        self.smooth = smooth
        self.rotate = rotate
    }
}

/// A strided view of a four-dimensional tensor in memory that the caller owns.
public struct Tensor {
    public var precision: Precision
    /// Address of element (0, 0, 0, 0); nil if `buffer` is used or there is no element.
    public var data: UnsafeMutableRawPointer?
    /// Instead of `data`: element (0, 0, 0, 0) lies `bufferOffset` bytes into it.
    public var buffer: Buffer?
    public var bufferOffset: Int
    public var shape: Shape
    public var strides: Strides
    /// Of INT8 and INT4; nil: scale 1, zero point 0. Ignored for other precisions.
    public var quantization: Quantization?

    public init(
        _ data: UnsafeMutableRawPointer?, precision: Precision, shape: Shape, strides: Strides, quantization: Quantization? = nil
    ) {
        self.precision = precision
        self.data = data
        self.buffer = nil
        self.bufferOffset = 0
        self.shape = shape
        self.strides = strides
        self.quantization = quantization
    }

    /// A contiguous tensor.
    public init(
        _ data: UnsafeMutableRawPointer?, precision: Precision, shape: Shape, layout: Layout = .bhsd, quantization: Quantization? = nil
    ) {
        self.init(
            data, precision: precision, shape: shape, strides: layout.strides(shape: shape, precision: precision),
            quantization: quantization)
    }

    /// A view into a buffer.
    public init(
        _ buffer: Buffer, offset: Int = 0, precision: Precision, shape: Shape, strides: Strides, quantization: Quantization? = nil
    ) {
        self.init(nil, precision: precision, shape: shape, strides: strides, quantization: quantization)
        self.buffer = buffer
        self.bufferOffset = offset
    }

    /// Whether there is an element.
    public var hasElements: Bool { shape[0] > 0 && shape[1] > 0 && shape[2] > 0 && shape[3] > 0 }

    /// The host's address of element (0, 0, 0, 0), wherever it comes from.
    public var address: UnsafeMutableRawPointer? {
        guard let buffer else { return data }
        guard let contents = buffer.contents else { return nil }
        return UnsafeMutableRawPointer(bitPattern: UInt(bitPattern: contents) &+ UInt(bitPattern: bufferOffset))
    }

    /// The quantisation of codes; nil for other precisions, whatever was given.
    public var effectiveQuantization: Quantization? { precision.isQuantized ? quantization : nil }

    /// The same view as bytes or larger units that do not overlap by construction: INT4 as bytes of two codes, all else as it is. Strides of
    /// axes with at most one element are 0, so that what a caller wrote there means nothing.
    package var units: (shape: Shape, strides: Strides) {
        var shape = shape
        var strides = strides
        if precision == .int4 {
            shape[3] = shape[3] / 2 + (shape[3] & 1)
            for axis in 0..<3 { strides[axis] >>= 1 }
        }
        for axis in 0..<4 where shape[axis] <= 1 { strides[axis] = 0 }
        return (shape, strides)
    }

    /// Some heads of one batch of a tensor of floats or a mask.
    func part(batch: Int, heads: Range<Int>) -> Tensor {
        let offset = (batch * strides[0] + heads.lowerBound * strides[1]) * precision.unitSize
        var part = self
        part.data = address.map { $0 + offset }
        part.buffer = nil
        part.shape[0] = min(shape[0], 1)
        part.shape[1] = heads.count
        return part
    }

    /// This tensor with an address of its own and with stride 0 on every axis of one element.
    func normalized() -> Tensor {
        var tensor = self
        tensor.data = address
        for axis in 0..<4 where shape[axis] <= 1 { tensor.strides[axis] = 0 }
        tensor.quantization = effectiveQuantization
        return tensor
    }
}

/// Where the scale of an element lies in the array of scales.
public struct ScaleLayout {
    /// How many scales there are.
    public let count: Int
    /// Index = b * strides[0] + h * strides[1] + (s / tokens) * strides[2] + (d / channels) * strides[3].
    public let strides: Strides
    /// Tokens and channels that share a scale.
    public let tokens: Int
    public let channels: Int

    /// Nil if the count overflows. Block and group sizes are 1 or more.
    public init?(_ granularity: Granularity, shape: Shape, blockSize: Int, groupSize: Int) {
        var tokens = 1
        var channels = 1
        var perHead = (tokens: 1, channels: 1)
        switch granularity {
        case .tensor:
            self.count = 1
            self.strides = Strides(repeating: 0)
            self.tokens = 1
            self.channels = 1
            return
        case .head:
            break
        case .token:
            perHead.tokens = shape[2]
        case .block:
            tokens = blockSize
            perHead.tokens = shape[2] / blockSize + (shape[2] % blockSize == 0 ? 0 : 1)
        case .channel:
            perHead.channels = shape[3]
        case .group:
            channels = groupSize
            perHead.tokens = shape[2]
            perHead.channels = shape[3] / groupSize + (shape[3] % groupSize == 0 ? 0 : 1)
        }
        guard let count = Shape(shape[0], shape[1], perHead.tokens, perHead.channels).elementCount else { return nil }
        self.count = count
        let hasTokens = granularity == .token || granularity == .block || granularity == .group
        let hasChannels = granularity == .channel || granularity == .group
        let head = perHead.tokens &* perHead.channels
        self.strides = Strides(shape[1] &* head, head, hasTokens ? perHead.channels : 0, hasChannels ? 1 : 0)
        self.tokens = tokens
        self.channels = channels
    }
}

extension SIMD4 where Scalar == Int {
    /// The product of four sizes, nil if that many elements of 8 bytes are more than 2^63 - 1 bytes. Sizes are not negative.
    var elementCount: Int? {
        if self[0] == 0 || self[1] == 0 || self[2] == 0 || self[3] == 0 { return 0 }
        var product = 8
        for axis in 0..<4 {
            let (next, overflow) = product.multipliedReportingOverflow(by: self[axis])
            if overflow { return nil }
            product = next
        }
        return product / 8
    }
}
