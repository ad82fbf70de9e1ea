import MFACore
import Metal

/// A place in a buffer of the device.
struct DeviceAddress {
    let buffer: any MTLBuffer
    let offset: Int
}

/// Finds the device's buffers behind addresses, and makes new ones.
struct DeviceMemory {
    private let device: any MTLDevice
    private var known: [Known] = []

    /// A buffer that a caller may use by its host address.
    private struct Known {
        weak var buffer: (any MTLBuffer)?
        let start: UInt
        let end: UInt
    }

    /// Of the largest pages that a Mac has; a multiple of every other.
    private static let page = 16384

    init(_ device: any MTLDevice) {
        self.device = device
    }

    /// A buffer of the device, zeroed.
    func make(_ size: Int) throws(MFAError) -> any MTLBuffer {
        guard let buffer = device.makeBuffer(length: size, options: .storageModeShared) else {
            throw MFAError(.allocationFailed, "a buffer of \(size) bytes on the device could not be had")
        }
        return buffer
    }

    /// Has `find` recognise addresses in a buffer, as long as that lives.
    mutating func remember(_ buffer: any MTLBuffer) {
        known.removeAll { $0.buffer == nil }
        let start = UInt(bitPattern: buffer.contents())
        known.append(Known(buffer: buffer, start: start, end: start + UInt(buffer.length)))
    }

    /// Where the device sees `size` bytes of the host's memory without a copy: in a buffer of its own, or where they fill whole pages.
    func find(_ memory: UnsafeMutableRawPointer, size: Int) -> DeviceAddress? {
        let start = UInt(bitPattern: memory)
        for candidate in known where start >= candidate.start && start + UInt(size) <= candidate.end {
            if let buffer = candidate.buffer { return DeviceAddress(buffer: buffer, offset: Int(start - candidate.start)) }
        }
        guard size > 0, start % UInt(DeviceMemory.page) == 0, size % DeviceMemory.page == 0,
            let buffer = device.makeBuffer(bytesNoCopy: memory, length: size, options: .storageModeShared, deallocator: nil)
        else { return nil }
        return DeviceAddress(buffer: buffer, offset: 0)
    }

    /// `size` bytes of the host's memory as the device sees them, copied where that is needed. Nil stands for no bytes.
    func share(_ memory: UnsafeRawPointer?, size: Int) throws(MFAError) -> DeviceAddress {
        guard let memory, size > 0 else { return DeviceAddress(buffer: try make(DeviceMemory.smallest), offset: 0) }
        if let found = find(UnsafeMutableRawPointer(mutating: memory), size: size) { return found }
        let buffer = try make(size)
        buffer.contents().copyMemory(from: memory, byteCount: size)
        return DeviceAddress(buffer: buffer, offset: 0)
    }

    /// A copy of plain values.
    func copy<Value: BitwiseCopyable>(_ values: [Value]) throws(MFAError) -> DeviceAddress {
        let buffer = try make(max(values.count * MemoryLayout<Value>.stride, 1))
        values.withUnsafeBytes { if let start = $0.baseAddress { buffer.contents().copyMemory(from: start, byteCount: $0.count) } }
        return DeviceAddress(buffer: buffer, offset: 0)
    }

    /// What stands for an operand without elements.
    private static let smallest = 16

    /// A tensor as the device sees it: where it is, if that can be, else its elements packed together. `lengths` limits the tokens that are
    /// read, for each sequence.
    func share(_ tensor: Tensor, lengths: [Int]? = nil) throws(MFAError) -> (DeviceAddress, Strides) {
        guard tensor.hasElements, let address = tensor.address else { return (try share(nil, size: 0), Strides(repeating: 0)) }
        if let found = locate(tensor) { return (found, tensor.strides) }
        let layout = PackedLayout(tensor)
        let buffer = try make(layout.size)
        // Broadcast sequences share their tokens, so those of the longest are read.
        let longest = lengths?.max() ?? tensor.shape[2]
        layout.forEachRow(tensor, tokens: { batch in layout.sharesSequences ? longest : lengths?[batch] ?? tensor.shape[2] }) {
            original, packed, count, stride in
            let from = address + original
            let to = buffer.contents() + packed
            if stride == layout.unitSize {
                to.copyMemory(from: from, byteCount: count * layout.unitSize)
            } else {
                for index in 0..<count {
                    (to + index * layout.unitSize).copyMemory(from: from + index * stride, byteCount: layout.unitSize)
                }
            }
        }
        return (DeviceAddress(buffer: buffer, offset: 0), layout.strides)
    }

    /// Where the device sees a tensor's own memory, if it does.
    func locate(_ tensor: Tensor) -> DeviceAddress? {
        guard let address = tensor.address else { return nil }
        let (shape, strides) = tensor.units
        var low = 0
        var high = tensor.precision.unitSize
        for axis in 0..<4 {
            let reach = (shape[axis] - 1) * strides[axis] * tensor.precision.unitSize
            if reach < 0 { low += reach } else { high += reach }
        }
        guard let found = find(address + low, size: high - low) else { return nil }
        return DeviceAddress(buffer: found.buffer, offset: found.offset - low)
    }
}

/// A tensor's elements side by side, in the order batch, head, token, channel; axes that the tensor broadcasts are not expanded.
struct PackedLayout {
    /// In elements, as `Tensor.strides`.
    let strides: Strides
    let size: Int
    let unitSize: Int
    /// Whether all sequences are one in memory.
    let sharesSequences: Bool
    private let unitShape: Shape
    private let unitStrides: Strides

    init(_ tensor: Tensor) {
        let (shape, original) = tensor.units
        unitSize = tensor.precision.unitSize
        var distinct = shape
        for axis in 0..<4 where original[axis] == 0 { distinct[axis] = 1 }
        var packed = Strides(repeating: 0)
        var count = 1
        for axis in [3, 2, 1, 0] {
            packed[axis] = distinct[axis] == 1 ? 0 : count
            count *= distinct[axis]
        }
        size = count * unitSize
        sharesSequences = distinct[0] == 1
        unitShape = distinct
        unitStrides = packed
        var strides = packed
        if tensor.precision == .int4 {
            for axis in 0..<3 { strides[axis] *= 2 }
            // Two channels a unit, which stand at distance 1.
            strides[3] = 1
        }
        self.strides = strides
    }

    /// Calls `body` for the channels of every token that is stored once: their offsets in bytes in the tensor and here, their count in units,
    /// and the distance in bytes of two of them in the tensor.
    func forEachRow(
        _ tensor: Tensor, tokens: (_ batch: Int) -> Int, _ body: (_ original: Int, _ packed: Int, _ count: Int, _ stride: Int) -> Void
    ) {
        let original = tensor.units.strides
        for batch in 0..<unitShape[0] {
            for head in 0..<unitShape[1] {
                for token in 0..<min(unitShape[2], tokens(batch)) {
                    let position = Shape(batch, head, token, 0)
                    body(
                        (position &* original).wrappedSum() * unitSize, (position &* unitStrides).wrappedSum() * unitSize, unitShape[3],
                        original[3] * unitSize)
                }
            }
        }
    }
}
