import CPUKernels
import MFACore

/// Quantising or dequantising one tensor: what the kernels need, and the workspace for it.
struct QuantizationPass {
    private let quantization: cpu_quantization
    private let kernel: cpu_quantization_kernel
    /// One byte a thread: whether it met a value that is not finite.
    private let failures: UnsafeMutablePointer<Bool>
    private let name: StaticString

    /// `lengths`: tokens beyond take no part.
    init(
        _ name: StaticString, from input: Tensor, to output: Tensor, lengths: UnsafePointer<Int64>? = nil,
        _ table: KernelTable, threads: Int32, _ layout: inout WorkspaceLayout
    ) throws(MFAError) {
        self.name = name
        kernel = table.quantization
        var quantization = cpu_quantization()
        quantization.batch_size = Int64(input.shape[0])
        quantization.num_heads = Int64(input.shape[1])
        quantization.seq_len = Int64(input.shape[2])
        quantization.head_dim = Int64(input.shape[3])
        quantization.lengths = lengths
        quantization.input = cpu_tensor(input)
        quantization.output = cpu_tensor(output)
        quantization.per_tensor = output.effectiveQuantization?.granularity == .tensor
        if output.precision.isQuantized {
            let extremes = try layout.take(input.shape[0] * input.shape[1], of: 2 * MemoryLayout<Float>.size)
            quantization.extremes = extremes.assumingMemoryBound(to: Float.self)
        }
        failures = try layout.take(Int(threads)).assumingMemoryBound(to: Bool.self)
        self.quantization = quantization
    }

    /// One for each head of each sequence.
    var items: Int64 { quantization.batch_size * quantization.num_heads }

    /// The workspace that each thread needs while this pass runs.
    var scratchSize: Int { withUnsafePointer(to: quantization) { Int(clamping: kernel.workspace_bytes($0)) } }

    private struct Work {
        let kernel: cpu_quantization_kernel
        let quantization: UnsafePointer<cpu_quantization>
        let failures: UnsafeMutablePointer<Bool>
        let team: Team
    }

    /// First half of quantising: finds the extremes. Throws if a value that takes part is not finite.
    func scan(_ team: Team) throws(MFAError) {
        try runChecked(team) { state, item, thread in
            guard let work = state?.assumingMemoryBound(to: Work.self).pointee else { return }
            if !work.kernel.scan(work.quantization, item, work.team.scratch(of: thread)) { work.failures[Int(thread)] = true }
        }
    }

    /// Second half: writes scales, zero points, means and codes.
    func write(_ team: Team) throws(MFAError) {
        try runChecked(team) { state, item, thread in
            guard let work = state?.assumingMemoryBound(to: Work.self).pointee else { return }
            if !work.kernel.write(work.quantization, item, work.team.scratch(of: thread)) { work.failures[Int(thread)] = true }
        }
    }

    /// Both halves, for codes in workspace: the second alone tells whether values are finite, where scales belong to single tokens.
    func writeWorkspace(_ team: Team) throws(MFAError) {
        let oneScale = quantization.output.scale_strides.2 == 0 && quantization.output.scale_strides.3 == 0
        if oneScale { try scan(team) }
        try write(team)
    }

    /// Runs a task that notes failures. Throws if there is one.
    private func runChecked(
        _ team: Team, _ task: @convention(c) (UnsafeMutableRawPointer?, Int64, Int32) -> Void
    ) throws(MFAError) {
        failures.initialize(repeating: false, count: Int(team.threads))
        run(team, task)
        for thread in 0..<Int(team.threads) where failures[thread] {
            throw .argument("`\(name)`: values to be quantised must be finite, as FP32 and after rotation and smoothing")
        }
    }

    /// Writes the real values of codes.
    func dequantize(_ team: Team) {
        run(team) { state, item, thread in
            guard let work = state?.assumingMemoryBound(to: Work.self).pointee else { return }
            work.kernel.dequantize(work.quantization, item, work.team.scratch(of: thread))
        }
    }

    private func run(_ team: Team, _ task: @convention(c) (UnsafeMutableRawPointer?, Int64, Int32) -> Void) {
        withUnsafePointer(to: quantization) {
            team.run(items, Work(kernel: kernel, quantization: $0, failures: failures, team: team), task)
        }
    }
}

/// A float operand and the codes in workspace that stand in for it.
struct FusedOperand {
    /// The codes.
    let tensor: cpu_tensor
    /// Writes them.
    let pass: QuantizationPass

    init(
        _ name: StaticString, _ operand: Tensor, scheme: QuantizationScheme, lengths: UnsafePointer<Int64>?,
        _ table: KernelTable, threads: Int32, _ layout: inout WorkspaceLayout
    ) throws(MFAError) {
        let shape = operand.shape
        guard let scales = ScaleLayout(scheme.granularity, shape: shape, blockSize: scheme.blockSize, groupSize: scheme.groupSize) else {
            throw .dimensions("`\(name)`: the number of scales overflows")
        }
        var quantization = Quantization(
            granularity: scheme.granularity, blockSize: scheme.blockSize, groupSize: scheme.groupSize, rotated: scheme.rotate, scales: nil)
        quantization.scales = try layout.take(scales.count, of: 4).assumingMemoryBound(to: Float.self)
        if scheme.asymmetric { quantization.zeroPoints = try layout.take(scales.count, of: 4).assumingMemoryBound(to: Int32.self) }
        if scheme.smooth {
            let means = try layout.take(shape[0] * shape[1] * shape[3], of: 4)
            quantization.channelMeans = means.assumingMemoryBound(to: Float.self)
        }
        let rowBytes = scheme.precision == .int4 ? (shape[3] + 1) / 2 : shape[3]
        let data = try layout.take(shape[0] * shape[1] * shape[2], of: rowBytes)
        let codes = Tensor(data, precision: scheme.precision, shape: shape, layout: .bhsd, quantization: quantization)
        tensor = cpu_tensor(codes)
        pass = try QuantizationPass(name, from: operand, to: codes, lengths: lengths, table, threads: threads, &layout)
    }
}
