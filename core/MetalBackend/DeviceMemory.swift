import MFACore
import Metal
import Support

/// A place in a buffer of the device.
struct DeviceAddress {
    let buffer: any MTLBuffer
    let offset: Int
}

/// The buffers that callers may use by their host addresses, of all contexts of this process.
private final class KnownBuffers: @unchecked Sendable {
    static let shared = KnownBuffers()

    private struct Known {
        weak var buffer: (any MTLBuffer)?
        let start: UInt
        let end: UInt
    }

    private var known: [Known] = []

    func insert(_ buffer: any MTLBuffer) {
        support_registry_lock()
        defer { support_registry_unlock() }
        known.removeAll { $0.buffer == nil || $0.buffer === buffer }
        let start = UInt(bitPattern: buffer.contents())
        known.append(Known(buffer: buffer, start: start, end: start + UInt(buffer.length)))
    }

    /// The buffer of a device that has these bytes.
    func find(_ start: UInt, size: Int, of device: any MTLDevice) -> DeviceAddress? {
        support_registry_lock()
        defer { support_registry_unlock() }
        for candidate in known where start >= candidate.start && start + UInt(size) <= candidate.end {
            if let buffer = candidate.buffer, buffer.device === device {
                return DeviceAddress(buffer: buffer, offset: Int(start - candidate.start))
            }
        }
        return nil
    }
}

/// Finds the device's buffers behind addresses, and makes new ones.
struct DeviceMemory {
    private let device: any MTLDevice

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
    func remember(_ buffer: any MTLBuffer) {
        KnownBuffers.shared.insert(buffer)
    }

    /// Where the device sees `size` bytes of the host's memory without a copy: in a buffer of its own, or where they fill whole pages.
    func find(_ memory: UnsafeMutableRawPointer, size: Int) -> DeviceAddress? {
        let start = UInt(bitPattern: memory)
        if let found = KnownBuffers.shared.find(start, size: size, of: device) { return found }
        return wrap(memory, size: size).map { DeviceAddress(buffer: $0, offset: 0) }
    }

    /// A buffer on the host's memory itself; nil if that is not whole pages.
    func wrap(_ memory: UnsafeMutableRawPointer, size: Int) -> (any MTLBuffer)? {
        guard size > 0, UInt(bitPattern: memory) % UInt(DeviceMemory.page) == 0, size % DeviceMemory.page == 0 else { return nil }
        return device.makeBuffer(bytesNoCopy: memory, length: size, options: .storageModeShared, deallocator: nil)
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

    /// Refuses a backward problem with an array that the device does not see where it is.
    func checkLocations(_ problem: BackwardProblem) throws(MFAError) {
        try checkLocations(problem.attention)
        let gradients = problem.gradients
        for (name, tensor) in [
            ("grad_output", gradients.gradOutput), ("grad_query", gradients.gradQuery), ("grad_key", gradients.gradKey),
            ("grad_value", gradients.gradValue), ("grad_mask", gradients.gradMask),
        ] {
            try checkLocation(name, tensor)
        }
        let statistics = problem.attention.rowCount * problem.attention.statisticSize
        let byHead = problem.attention.numHeads * problem.attention.statisticSize
        try checkLocation("grad_logsumexp", gradients.gradLogsumexp, size: statistics)
        try checkLocation("d_values", gradients.dValues, size: statistics)
        try checkLocation("grad_sinks", gradients.gradSinks, size: byHead)
        try checkLocation("grad_alibi_slopes", gradients.gradAlibiSlopes, size: byHead)
    }

    /// Refuses a problem with an array that the device does not see where it is.
    func checkLocations(_ problem: AttentionProblem) throws(MFAError) {
        let options = problem.options
        for (name, tensor) in [("query", problem.query), ("key", problem.key), ("value", problem.value), ("output", problem.output)] {
            try checkLocation(name, tensor)
        }
        try checkLocation("mask", options.mask)
        let statistics = problem.numHeads * problem.statisticSize
        try checkLocation("logsumexp", problem.logsumexp, size: problem.rowCount * problem.statisticSize)
        try checkLocation("query_offsets", options.queryOffsets, size: options.numQueryOffsets * MemoryLayout<Int64>.size)
        try checkLocation("kv_lengths", options.kvLengths, size: problem.batchSize * MemoryLayout<Int64>.size)
        try checkLocation("alibi_slopes", options.alibiSlopes, size: statistics)
        try checkLocation("sinks", options.sinks, size: statistics)
    }

    /// Of a tensor, its scales, zero points and means.
    private func checkLocation(_ name: String, _ tensor: Tensor?) throws(MFAError) {
        guard let tensor, tensor.hasElements else { return }
        if locate(tensor) == nil { throw DeviceMemory.notInABuffer(name) }
        guard let quantization = tensor.effectiveQuantization,
            let layout = ScaleLayout(
                quantization.granularity, shape: tensor.shape, blockSize: quantization.blockSize, groupSize: quantization.groupSize)
        else { return }
        try checkLocation("\(name).scales", quantization.scales, size: layout.count * MemoryLayout<Float>.size)
        try checkLocation("\(name).zero_points", quantization.zeroPoints, size: layout.count * MemoryLayout<Int32>.size)
        let means = tensor.shape[0] * tensor.shape[1] * tensor.shape[3]
        try checkLocation("\(name).channel_means", quantization.channelMeans, size: means * MemoryLayout<Float>.size)
    }

    private func checkLocation(_ name: String, _ array: UnsafeRawPointer?, size: Int) throws(MFAError) {
        guard let array, size > 0 else { return }
        if find(UnsafeMutableRawPointer(mutating: array), size: size) == nil { throw DeviceMemory.notInABuffer(name) }
    }

    private static func notInABuffer(_ name: String) -> MFAError {
        .argument("`\(name)` must lie in a buffer of the device, to be read or written when the command buffer runs")
    }

    /// Where the device sees a tensor's own memory, if it does.
    func locate(_ tensor: Tensor) -> DeviceAddress? {
        if let buffer = tensor.buffer?.deviceObject as? any MTLBuffer, buffer.device === device {
            return DeviceAddress(buffer: buffer, offset: tensor.bufferOffset)
        }
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
