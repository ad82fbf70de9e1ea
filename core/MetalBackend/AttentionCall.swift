import CPUBackend
import MFACore
import Metal

// The structs of attention_forward.metal, field by field.

private typealias Long4 = (Int64, Int64, Int64, Int64)

private func long4(_ strides: Strides) -> Long4 {
    (Int64(strides[0]), Int64(strides[1]), Int64(strides[2]), Int64(strides[3]))
}

private struct TensorView {
    var strides: Long4
    var scaleStrides: Long4 = (0, 0, 0, 0)
    var meanStrides: (Int64, Int64) = (0, 0)
    var scaleTokens: Int32 = 1
    var scaleChannels: Int32 = 1
    var hasZeroPoints: Int32 = 0
    var hasMeans: Int32 = 0
}

private struct Parameters {
    var query: TensorView
    var key: TensorView
    var value: TensorView
    var output: TensorView
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
    var reserved: UInt32 = 0
}

private struct Sequence {
    var offset: Int64
    var length: Int64
}

/// One forward problem as the device gets it: everything it reads and writes lies in buffers of its own or that it shares with the host.
struct AttentionCall: DeviceCall {
    private let problem: AttentionProblem
    private let kernel: AttentionKernel
    private let pipeline: any MTLComputePipelineState
    private let parameters: Parameters
    /// By index in the kernel's signature.
    private let bindings: [(index: Int, address: DeviceAddress)]
    /// What is copied to the caller's memory at the end.
    private let copiedOutput: (any MTLBuffer)?
    private let copiedLogsumexp: (any MTLBuffer)?
    /// Where the kernel says that float is too narrow.
    private let needsCareFlag: any MTLBuffer

    /// Whether the results mean nothing, once the kernel has run: a score or a sum was beyond the range of float.
    private var needsCare: Bool { needsCareFlag.contents().load(as: UInt32.self) != 0 }

    /// Takes all memory that the call needs, and reads the operands that have to be copied.
    init(
        _ problem: AttentionProblem, _ kernel: AttentionKernel, _ memory: DeviceMemory, _ kernels: inout AttentionKernels
    ) throws(MFAError) {
        guard let output = problem.output else { throw .argument("`output` must not be NULL") }
        self.problem = problem
        self.kernel = kernel
        pipeline = try kernels.pipeline(kernel, AttentionKernelOptions(problem))
        let sequences = AttentionCall.sequences(problem)
        let lengths = sequences.map { Int($0.length) }
        var bindings: [(index: Int, address: DeviceAddress)] = []

        bindings.append((1, try memory.copy(sequences)))
        let query = try AttentionCall.share(problem.query, nil, at: (2, 10, 11, nil), memory, &bindings)
        let key = try AttentionCall.share(problem.key, lengths, at: (3, 12, 13, 14), memory, &bindings)
        let value = try AttentionCall.share(problem.value, lengths, at: (4, 15, 16, nil), memory, &bindings)

        var outputStrides = output.strides
        if let found = memory.locate(output) {
            bindings.append((5, found))
            copiedOutput = nil
        } else {
            let layout = PackedLayout(output)
            let buffer = try memory.make(max(layout.size, 1))
            bindings.append((5, DeviceAddress(buffer: buffer, offset: 0)))
            outputStrides = layout.strides
            copiedOutput = buffer
        }
        if let logsumexp = problem.logsumexp {
            let size = problem.rowCount * MemoryLayout<Float>.size
            if let found = memory.find(logsumexp, size: size) {
                bindings.append((6, found))
                copiedLogsumexp = nil
            } else {
                let buffer = try memory.make(size)
                bindings.append((6, DeviceAddress(buffer: buffer, offset: 0)))
                copiedLogsumexp = buffer
            }
        } else {
            copiedLogsumexp = nil
        }
        var maskStrides = Strides(repeating: 0)
        if let mask = problem.options.mask {
            let (address, strides) = try memory.share(mask)
            bindings.append((7, address))
            maskStrides = strides
        }
        let statistics = problem.numHeads * MemoryLayout<Float>.size
        if let slopes = problem.options.alibiSlopes { bindings.append((8, try memory.share(slopes, size: statistics))) }
        if let sinks = problem.options.sinks { bindings.append((9, try memory.share(sinks, size: statistics))) }
        needsCareFlag = try memory.make(MemoryLayout<UInt32>.size)
        bindings.append((17, DeviceAddress(buffer: needsCareFlag, offset: 0)))
        self.bindings = bindings

        let dropout = problem.options.dropoutP
        let threshold = UInt64(dropout * 0x1p32)
        parameters = Parameters(
            query: query, key: key, value: value, output: TensorView(strides: long4(outputStrides)), maskStrides: long4(maskStrides),
            windowLeft: problem.options.windowLeft, windowRight: problem.options.windowRight, batchSize: Int32(problem.batchSize),
            numHeads: Int32(problem.numHeads), numKVHeads: Int32(problem.numKVHeads), seqLenQ: Int32(problem.seqLenQ),
            seqLenKV: Int32(problem.seqLenKV), headDim: Int32(problem.headDim), headDimV: Int32(problem.headDimV),
            softmaxScale: Float(problem.softmaxScale), softcap: Float(problem.options.softcap),
            keptScale: dropout < 1 ? Float(1 / (1 - dropout)) : 0, dropThreshold: UInt32(truncatingIfNeeded: threshold),
            dropsAll: threshold >> 32 == 0 ? 0 : 1, seedLow: UInt32(truncatingIfNeeded: problem.options.seed),
            seedHigh: UInt32(truncatingIfNeeded: problem.options.seed >> 32), dropoutOffset: problem.options.dropoutOffset)
    }

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

    /// Binds an operand, and for codes its scales, zero points and means, at their indices.
    private static func share(
        _ tensor: Tensor, _ lengths: [Int]?, at indices: (data: Int, scales: Int, zeroPoints: Int, means: Int?), _ memory: DeviceMemory,
        _ bindings: inout [(index: Int, address: DeviceAddress)]
    ) throws(MFAError) -> TensorView {
        let (address, strides) = try memory.share(tensor, lengths: lengths)
        bindings.append((indices.data, address))
        var view = TensorView(strides: long4(strides))
        guard tensor.precision.isQuantized else { return view }
        var scales: UnsafePointer<Float>?
        var zeroPoints: UnsafePointer<Int32>?
        var means: UnsafePointer<Float>?
        var count = 1
        if let quantization = tensor.quantization,
            let layout = ScaleLayout(
                quantization.granularity, shape: tensor.shape, blockSize: quantization.blockSize, groupSize: quantization.groupSize)
        {
            scales = UnsafePointer(quantization.scales)
            zeroPoints = UnsafePointer(quantization.zeroPoints)
            means = UnsafePointer(quantization.channelMeans)
            count = layout.count
            view.scaleStrides = long4(layout.strides)
            view.scaleTokens = Int32(clamping: layout.tokens)
            view.scaleChannels = Int32(clamping: layout.channels)
            view.meanStrides = (Int64(tensor.shape[1] * tensor.shape[3]), Int64(tensor.shape[3]))
        }
        if let scales {
            bindings.append((indices.scales, try memory.share(scales, size: count * MemoryLayout<Float>.size)))
        } else {
            let buffer = try memory.make(MemoryLayout<Float>.size)
            buffer.contents().storeBytes(of: 1, as: Float.self)
            bindings.append((indices.scales, DeviceAddress(buffer: buffer, offset: 0)))
        }
        view.hasZeroPoints = zeroPoints == nil ? 0 : 1
        bindings.append((indices.zeroPoints, try memory.share(zeroPoints, size: count * MemoryLayout<Int32>.size)))
        if let index = indices.means {
            view.hasMeans = means == nil ? 0 : 1
            let size = tensor.shape[0] * tensor.shape[1] * tensor.shape[3] * MemoryLayout<Float>.size
            bindings.append((index, try memory.share(means, size: size)))
        }
        return view
    }

    /// Binds everything and dispatches the kernel.
    func encode(_ encoder: any MTLComputeCommandEncoder) {
        encoder.setComputePipelineState(pipeline)
        withUnsafeBytes(of: parameters) { bytes in
            if let start = bytes.baseAddress { encoder.setBytes(start, length: bytes.count, index: 0) }
        }
        for (index, address) in bindings { encoder.setBuffer(address.buffer, offset: address.offset, index: index) }
        let rows = 32
        let blocks = (problem.headDimV + kernel.channels - 1) / kernel.channels
        encoder.dispatchThreadgroups(
            MTLSize(width: (problem.seqLenQ + rows - 1) / rows, height: problem.numHeads * blocks, depth: problem.batchSize),
            threadsPerThreadgroup: MTLSize(width: 128, height: 1, depth: 1))
    }

    /// Copies what the device wrote to where the caller wants it.
    func finish(_ cpu: CPUBackend) throws(MFAError) {
        if needsCare { try cpu.forward(problem) } else { copyResults() }
    }

    private func copyResults() {
        if let copiedOutput, let output = problem.output, let address = output.address {
            let layout = PackedLayout(output)
            layout.forEachRow(output, tokens: { _ in output.shape[2] }) { original, packed, count, stride in
                let from = copiedOutput.contents() + packed
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
        if let copiedLogsumexp, let logsumexp = problem.logsumexp {
            logsumexp.copyMemory(from: copiedLogsumexp.contents(), byteCount: copiedLogsumexp.length)
        }
    }
}
