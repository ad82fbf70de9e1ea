// From validated values to the structs that kernels read.

import CPUKernels
import MFACore

extension Precision {
    var kernelPrecision: cpu_precision {
        switch self {
        case .fp32: CPU_FP32
        case .fp16: CPU_FP16
        case .bf16: CPU_BF16
        case .fp64: CPU_FP64
        case .int4: CPU_INT4
        case .int8: CPU_INT8
        case .bool: CPU_BOOL
        }
    }
}

extension cpu_tensor {
    /// A tensor that is there.
    init(_ tensor: Tensor) {
        self.init()
        data = tensor.address
        strides = (Int64(tensor.strides[0]), Int64(tensor.strides[1]), Int64(tensor.strides[2]), Int64(tensor.strides[3]))
        precision = tensor.precision.kernelPrecision
        scale_tokens = 1
        scale_channels = 1
        guard let quantization = tensor.effectiveQuantization,
            let layout = ScaleLayout(
                quantization.granularity, shape: tensor.shape, blockSize: quantization.blockSize, groupSize: quantization.groupSize)
        else { return }
        rotated = quantization.rotated
        scales = quantization.scales
        zero_points = quantization.zeroPoints
        channel_means = quantization.channelMeans
        scale_strides = (Int64(layout.strides[0]), Int64(layout.strides[1]), Int64(layout.strides[2]), Int64(layout.strides[3]))
        scale_tokens = Int64(layout.tokens)
        scale_channels = Int64(layout.channels)
        mean_strides = (Int64(tensor.shape[1] * tensor.shape[3]), Int64(tensor.shape[3]))
    }

    /// A tensor that may be absent: `data` NULL.
    init(_ tensor: Tensor?) {
        if let tensor { self.init(tensor) } else { self.init() }
    }
}

extension cpu_attention {
    /// A problem without gradients.
    init(_ problem: AttentionProblem) {
        self.init()
        batch_size = Int64(problem.batchSize)
        num_heads = Int64(problem.numHeads)
        num_kv_heads = Int64(problem.numKVHeads)
        seq_len_q = Int64(problem.seqLenQ)
        seq_len_kv = Int64(problem.seqLenKV)
        head_dim = Int64(problem.headDim)
        head_dim_v = Int64(problem.headDimV)
        self.query = cpu_tensor(problem.query)
        self.key = cpu_tensor(problem.key)
        self.value = cpu_tensor(problem.value)
        output = cpu_tensor(problem.output)
        logsumexp = problem.logsumexp
        mask = cpu_tensor(problem.options.mask)
        causal = problem.options.causal
        lower_right = problem.options.alignment == .lowerRight
        query_offsets = problem.options.queryOffsets
        query_offset_stride = problem.options.numQueryOffsets > 1 ? 1 : 0
        window_left = problem.options.windowLeft
        window_right = problem.options.windowRight
        kv_lengths = problem.options.kvLengths
        softmax_scale = problem.softmaxScale
        softcap = problem.options.softcap
        alibi_slopes = problem.options.alibiSlopes
        sinks = problem.options.sinks
        dropout_p = problem.options.dropoutP
        seed = problem.options.seed
        dropout_offset = problem.options.dropoutOffset
    }

    /// Adds the gradients.
    mutating func add(_ gradients: AttentionGradients, dValues: UnsafeMutableRawPointer) {
        grad_output = cpu_tensor(gradients.gradOutput)
        grad_logsumexp = gradients.gradLogsumexp
        d_values = dValues
        grad_query = cpu_tensor(gradients.gradQuery)
        grad_key = cpu_tensor(gradients.gradKey)
        grad_value = cpu_tensor(gradients.gradValue)
        grad_mask = cpu_tensor(gradients.gradMask)
        grad_sinks = gradients.gradSinks
        grad_alibi_slopes = gradients.gradAlibiSlopes
    }
}
