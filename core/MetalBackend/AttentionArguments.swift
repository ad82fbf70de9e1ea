import MFACore
import Metal

// The structs of tensors.h and attention.h, field by field.

typealias Long4 = (Int64, Int64, Int64, Int64)

func long4(_ strides: Strides) -> Long4 {
    (Int64(strides[0]), Int64(strides[1]), Int64(strides[2]), Int64(strides[3]))
}

struct TensorView {
    var strides: Long4
    var scaleStrides: Long4 = (0, 0, 0, 0)
    var meanStrides: (Int64, Int64) = (0, 0)
    var scaleTokens: Int32 = 1
    var scaleChannels: Int32 = 1
    var hasZeroPoints: Int32 = 0
    var hasMeans: Int32 = 0
}

struct AttentionParameters {
    var query: TensorView
    var key: TensorView
    var value: TensorView
    var output = TensorView(strides: (0, 0, 0, 0))
    var maskStrides: Long4
    var windowLeft: Int64
    var windowRight: Int64
    var batchSize: Int32
    var numHeads: Int32
    var numKVHeads: Int32
    var seqLenQ: Int32
    var seqLenKV: Int32
    var headDim: Int32
    var headDimV: Int32
    var softmaxScale: Float
    var softcap: Float
    var keptScale: Float
    var dropThreshold: UInt32
    var dropsAll: UInt32
    var seedLow: UInt32
    var seedHigh: UInt32
    var dropoutOffset: UInt32
    var heedsRefusal: UInt32
}

struct Sequence {
    var offset: Int64
    var length: Int64
}

/// Buffers by their index in a kernel's signature.
struct Bindings {
    private var addresses: [Int: DeviceAddress] = [:]

    subscript(index: Int) -> DeviceAddress? {
        get { addresses[index] }
        set { addresses[index] = newValue }
    }

    func set(_ encoder: any MTLComputeCommandEncoder) {
        for (index, address) in addresses { encoder.setBuffer(address.buffer, offset: address.offset, index: index) }
    }
}

extension MTLComputeCommandEncoder {
    /// Binds a struct of the kernel's parameters.
    func setParameters<Value: BitwiseCopyable>(_ value: Value, index: Int) {
        withUnsafeBytes(of: value) { bytes in
            if let start = bytes.baseAddress { setBytes(start, length: bytes.count, index: index) }
        }
    }
}

/// What all kernels of attention get: the operands and options of one problem, in memory that the device sees, and what quantises operands
/// on the way in.
struct AttentionArguments {
    var parameters: AttentionParameters
    var bindings = Bindings()
    /// Finds out where the rows of each sequence stand, if the host must not.
    private let sequencesPass: SequencesPass?
    private var passes: [QuantizePass] = []
    private let flags: DeviceFlags

    // The words of `flags`: whether float is too narrow for a row, and whether an operand has a value that cannot be quantised.
    private static let care = 0
    private static let query = 1
    private static let key = 2
    private static let value = 3
    /// From here on: whether it is for this row that float is too narrow.
    private static let careOfRows = 4

    /// Takes the memory, and reads the operands that have to be copied; of a deferred call, none.
    init(
        _ problem: AttentionProblem, _ memory: DeviceMemory, _ library: inout KernelLibrary, isDeferred: Bool = false
    ) throws(MFAError) {
        let options = problem.options
        var lengths: [Int]?
        let sequences: DeviceAddress
        if isDeferred {
            let pass = try SequencesPass(problem, memory, &library)
            sequences = pass.sequences
            sequencesPass = pass
        } else {
            let values = AttentionArguments.sequences(problem)
            lengths = values.map { Int($0.length) }
            sequences = try memory.copy(values)
            sequencesPass = nil
        }
        bindings[1] = sequences
        flags = try DeviceFlags(AttentionArguments.careOfRows + problem.rowCount, memory)
        bindings[27] = flags.address(AttentionArguments.care)
        let query = try AttentionArguments.bind(
            problem.query, options.quantizeQuery, nil, nil, flags.address(AttentionArguments.query), to: (2, 10, 11, nil), memory, &library,
            &bindings, &passes)
        let key = try AttentionArguments.bind(
            problem.key, options.quantizeKey, lengths, sequences, flags.address(AttentionArguments.key), to: (3, 12, 13, 14), memory,
            &library, &bindings, &passes)
        let value = try AttentionArguments.bind(
            problem.value, options.quantizeValue, lengths, sequences, flags.address(AttentionArguments.value), to: (4, 15, 16, nil), memory,
            &library, &bindings, &passes)
        var maskStrides = Strides(repeating: 0)
        if let mask = problem.options.mask { (bindings[7], maskStrides) = try memory.share(mask) }
        let statistics = problem.numHeads * MemoryLayout<Float>.size
        if let slopes = problem.options.alibiSlopes { bindings[8] = try memory.share(slopes, size: statistics) }
        if let sinks = problem.options.sinks { bindings[9] = try memory.share(sinks, size: statistics) }

        let dropout = problem.options.dropoutP
        let threshold = UInt64(dropout * 0x1p32)
        parameters = AttentionParameters(
            query: query, key: key, value: value, maskStrides: long4(maskStrides),
            windowLeft: problem.options.windowLeft, windowRight: problem.options.windowRight, batchSize: Int32(problem.batchSize),
            numHeads: Int32(problem.numHeads), numKVHeads: Int32(problem.numKVHeads), seqLenQ: Int32(problem.seqLenQ),
            seqLenKV: Int32(problem.seqLenKV), headDim: Int32(problem.headDim), headDimV: Int32(problem.headDimV),
            softmaxScale: Float(problem.softmaxScale), softcap: Float(problem.options.softcap),
            keptScale: dropout < 1 ? Float(1 / (1 - dropout)) : 0, dropThreshold: UInt32(truncatingIfNeeded: threshold),
            dropsAll: threshold >> 32 == 0 ? 0 : 1, seedLow: UInt32(truncatingIfNeeded: problem.options.seed),
            seedHigh: UInt32(truncatingIfNeeded: problem.options.seed >> 32), dropoutOffset: problem.options.dropoutOffset,
            heedsRefusal: passes.isEmpty || isDeferred ? 0 : 1)
    }

    /// Binds an operand, or the codes that a scheme makes of it.
    private static func bind(
        _ operand: Tensor, _ scheme: QuantizationScheme?, _ lengths: [Int]?, _ sequences: DeviceAddress?, _ refused: DeviceAddress,
        to indices: (data: Int, scales: Int, zeroPoints: Int, means: Int?), _ memory: DeviceMemory, _ library: inout KernelLibrary,
        _ bindings: inout Bindings, _ passes: inout [QuantizePass]
    ) throws(MFAError) -> TensorView {
        guard let scheme else { return try memory.bind(operand, lengths: lengths, to: indices, &bindings) }
        let codes = try QuantizePass.Codes(of: operand, scheme, memory)
        bindings[indices.data] = codes.data
        bindings[indices.scales] = codes.scales
        bindings[indices.zeroPoints] = codes.zeroPoints ?? codes.scales
        if let index = indices.means { bindings[index] = codes.means ?? codes.scales }
        if operand.hasElements {
            let (source, strides) = try memory.share(operand, lengths: lengths)
            passes.append(
                try QuantizePass(
                    operand, at: source, strides: strides, into: codes, sequences: sequences, refused: refused, checksFirst: false, memory,
                    &library))
        }
        return codes.view
    }

    /// Has the device do what comes before attention.
    func encodePasses(_ encoder: any MTLComputeCommandEncoder) {
        sequencesPass?.encode(encoder)
        for pass in passes { pass.encode(encoder) }
    }

    /// Throws if an operand could not be quantised: then no result was written.
    func checkPasses() throws(MFAError) {
        if flags[AttentionArguments.query] { throw .notFinite("query") }
        if flags[AttentionArguments.key] { throw .notFinite("key") }
        if flags[AttentionArguments.value] { throw .notFinite("value") }
    }

    /// Whether there are rows whose results mean nothing, once the kernel has run: a score or a sum was beyond the range of float.
    var needsCare: Bool { flags[AttentionArguments.care] }

    /// Whether a row, by its place among the statistics, is one of them.
    func needsCare(_ statistic: Int) -> Bool { flags[AttentionArguments.careOfRows + statistic] }

    /// Where each sequence's rows stand, and how many keys it has.
    private static func sequences(_ problem: AttentionProblem) -> [Sequence] {
        let options = problem.options
        return (0..<problem.batchSize).map { batch in
            let length = options.kvLengths?[batch] ?? Int64(problem.seqLenKV)
            var offset: Int64 = 0
            if let offsets = options.queryOffsets {
                offset = offsets[options.numQueryOffsets > 1 ? batch : 0]
            } else if options.alignment == .lowerRight {
                offset = length - Int64(problem.seqLenQ)
            }
            return Sequence(offset: offset, length: length)
        }
    }
}

extension DeviceMemory {
    /// Binds an operand, and for codes its scales, zero points and means, at their indices.
    func bind(
        _ tensor: Tensor, lengths: [Int]? = nil, to indices: (data: Int, scales: Int, zeroPoints: Int, means: Int?),
        _ bindings: inout Bindings
    ) throws(MFAError) -> TensorView {
        let (address, strides) = try share(tensor, lengths: lengths)
        bindings[indices.data] = address
        var view = TensorView(strides: long4(strides))
        guard tensor.precision.isQuantized else { return view }
        var quantization = tensor.quantization
        var count = 1
        if let given = quantization {
            guard
                let layout = ScaleLayout(
                    given.granularity, shape: tensor.shape, blockSize: given.blockSize, groupSize: given.groupSize)
            else { throw .dimensions("the number of scales overflows") }
            count = layout.count
            view.place(layout, tensor.shape)
        }
        if quantization?.scales == nil { quantization = nil }
        if let scales = quantization?.scales {
            bindings[indices.scales] = try share(scales, size: count * MemoryLayout<Float>.size)
        } else {
            bindings[indices.scales] = try copy([Float(1)])
            view.scaleStrides = (0, 0, 0, 0)
        }
        view.hasZeroPoints = quantization?.zeroPoints == nil ? 0 : 1
        bindings[indices.zeroPoints] = try share(quantization?.zeroPoints, size: count * MemoryLayout<Int32>.size)
        if let index = indices.means {
            view.hasMeans = quantization?.channelMeans == nil ? 0 : 1
            let size = tensor.shape[0] * tensor.shape[1] * tensor.shape[3] * MemoryLayout<Float>.size
            bindings[index] = try share(quantization?.channelMeans, size: size)
        }
        return view
    }
}

extension TensorView {
    /// Sets where scales and means lie.
    mutating func place(_ layout: ScaleLayout, _ shape: Shape) {
        scaleStrides = long4(layout.strides)
        scaleTokens = Int32(clamping: layout.tokens)
        scaleChannels = Int32(clamping: layout.channels)
        meanStrides = (Int64(shape[1] * shape[3]), Int64(shape[3]))
    }
}

/// What a call writes: into the caller's memory where the device sees it, else into buffers that are copied at the end.
struct DeviceResults {
    private var tensors: [(tensor: Tensor, buffer: any MTLBuffer)] = []
    private var arrays: [(array: UnsafeMutableRawPointer, buffer: any MTLBuffer)] = []

    /// Where the device writes a tensor, and by which strides.
    mutating func add(_ tensor: Tensor, _ memory: DeviceMemory) throws(MFAError) -> (DeviceAddress, TensorView) {
        if let found = memory.locate(tensor) { return (found, TensorView(strides: long4(tensor.strides))) }
        let layout = PackedLayout(tensor)
        let buffer = try memory.make(max(layout.size, 1))
        tensors.append((tensor, buffer))
        return (DeviceAddress(buffer: buffer, offset: 0), TensorView(strides: long4(layout.strides)))
    }

    /// Where the device writes an array of so many bytes.
    mutating func add(_ array: UnsafeMutableRawPointer, size: Int, _ memory: DeviceMemory) throws(MFAError) -> DeviceAddress {
        if let found = memory.find(array, size: size) { return found }
        let buffer = try memory.make(size)
        arrays.append((array, buffer))
        return DeviceAddress(buffer: buffer, offset: 0)
    }

    /// Copies what the device wrote to where the caller wants it.
    func copy() {
        for (tensor, buffer) in tensors {
            guard let address = tensor.address else { continue }
            let layout = PackedLayout(tensor)
            layout.forEachRow(tensor, tokens: { _ in tensor.shape[2] }) { original, packed, count, stride in
                let from = buffer.contents() + packed
                let to = address + original
                if stride == layout.unitSize {
                    to.copyMemory(from: from, byteCount: count * layout.unitSize)
                } else {
                    for index in 0..<count {
                        (to + index * stride).copyMemory(from: from + index * layout.unitSize, byteCount: layout.unitSize)
                    }
                }
            }
        }
        for (array, buffer) in arrays { array.copyMemory(from: buffer.contents(), byteCount: buffer.length) }
    }
}
