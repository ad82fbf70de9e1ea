import MFACore
import Metal

// The struct of attention_sequences.metal, field by field.
private struct SequenceParameters {
    var seqLenQ: Int64
    var seqLenKV: Int64
    var batchSize: Int32
    var hasLengths: Int32
    var numQueryOffsets: Int32
    var isLowerRight: Int32
}

/// Where the rows of each sequence stand among its keys, found out by the device from arrays that the host must not read.
struct SequencesPass {
    /// What it writes.
    let sequences: DeviceAddress
    private let pipeline: any MTLComputePipelineState
    private let parameters: SequenceParameters
    private var bindings = Bindings()

    init(_ problem: AttentionProblem, _ memory: DeviceMemory, _ library: inout KernelLibrary) throws(MFAError) {
        let options = problem.options
        pipeline = try library.pipeline("attention_sequences_metal", of: .attentionSequences, KernelConstants())
        parameters = SequenceParameters(
            seqLenQ: Int64(problem.seqLenQ), seqLenKV: Int64(problem.seqLenKV), batchSize: Int32(problem.batchSize),
            hasLengths: options.kvLengths == nil ? 0 : 1,
            numQueryOffsets: options.queryOffsets == nil ? 0 : Int32(options.numQueryOffsets),
            isLowerRight: options.alignment == .lowerRight ? 1 : 0)
        let buffer = try memory.make(problem.batchSize * MemoryLayout<Sequence>.stride)
        sequences = DeviceAddress(buffer: buffer, offset: 0)
        let element = MemoryLayout<Int64>.size
        bindings[1] = try memory.share(options.kvLengths, size: problem.batchSize * element)
        bindings[2] = try memory.share(options.queryOffsets, size: options.numQueryOffsets * element)
        bindings[3] = sequences
    }

    func encode(_ encoder: any MTLComputeCommandEncoder) {
        encoder.setComputePipelineState(pipeline)
        encoder.setParameters(parameters, index: 0)
        bindings.set(encoder)
        let width = 32
        encoder.dispatchThreadgroups(
            MTLSize(width: (Int(parameters.batchSize) + width - 1) / width, height: 1, depth: 1),
            threadsPerThreadgroup: MTLSize(width: width, height: 1, depth: 1))
    }
}
