// The CPU: plans a validated problem and runs its kernels.

import CPUKernels
import MFACore

#if canImport(Glibc)
import Glibc
#else
import Darwin
#endif

/// Computes on the host's processors, at once.
public final class CPUBackend: Backend {
    public let device = Device.cpu
    public let info: BackendInfo
    public let arrayAccess = ArrayAccess.all
    private let threads: Int32
    private let table: KernelTable
    private let allocator: Allocator
    private var workspace: Workspace

    /// The most threads that a call can use.
    public static let mostThreads = Int(CPU_MAX_THREADS)

    /// `threads`: 0 for MFA_NUM_THREADS if that is set, else for what the process may use.
    public init(threads: Int = 0, allocator: Allocator = .system) throws(MFAError) {
        self.threads = try CPUBackend.threadCount(asked: threads)
        self.allocator = allocator
        table = try KernelTable(forced: environment("MFA_KERNELS"))
        workspace = Workspace(allocator: allocator)
        info = BackendInfo(
            name: "cpu", instructionSet: table.instructionSet.name, numThreads: Int(self.threads),
            operandPrecisions: [.fp32, .fp16, .bf16, .fp64, .int8, .int4])
    }

    deinit {
        workspace.release()
    }

    private static func threadCount(asked: Int) throws(MFAError) -> Int32 {
        if asked > 0 { return Int32(min(asked, mostThreads)) }
        if let text = environment("MFA_NUM_THREADS"), !text.isEmpty {
            guard let number = Int32(text), 1...mostThreads ~= Int(number) else {
                throw MFAError(.deviceUnavailable, "MFA_NUM_THREADS takes a number from 1 to \(mostThreads) (got \"\(text)\")")
            }
            return number
        }
        return min(max(cpu_available_threads(), 1), Int32(mostThreads))
    }

    // MARK: Memory

    public var heldWorkspace: Int { workspace.size }

    public func abandonWorkspace() {
        workspace.abandon()
    }

    public func makeBuffer(size: Int) throws(MFAError) -> Buffer {
        if size == 0 { return Buffer(contents: nil, size: 0) }
        let page = max(Int(sysconf(Int32(_SC_PAGESIZE))), Workspace.alignment)
        guard let memory = allocator.allocate(size, page) else {
            throw MFAError(.allocationFailed, "a buffer of \(size) bytes could not be had")
        }
        memset(memory, 0, size)
        let address = UInt(bitPattern: memory)
        return Buffer(
            contents: memory, size: size,
            release: { [allocator] in
                if let memory = UnsafeMutableRawPointer(bitPattern: address) { allocator.deallocate(memory, size, page) }
            })
    }

    public func wrap(_ memory: UnsafeMutableRawPointer?, size: Int) throws(MFAError) -> Buffer {
        Buffer(contents: size == 0 ? nil : memory, size: size)
    }

    // MARK: Attention

    public func forward(_ problem: AttentionProblem) throws(MFAError) {
        if problem.isEmpty {
            _ = try AttentionPlan.kernel(.forward, problem, table)
            return
        }
        guard let parts = FusedParts(problem, threads: threads) else {
            try plan(problem, nil).run()
            return
        }
        // Nothing may be written before all values are known to be finite.
        for (name, operand, scheme, lengths) in parts.fused {
            let (pass, team) = try layOut { (layout) throws(MFAError) in
                let pass = try QuantizationPass(
                    name, from: operand, to: scheme.codes(of: operand), lengths: lengths, table, threads: threads, &layout)
                let team = try Team(threads: threads, items: pass.items, scratchSize: pass.scratchSize, &layout)
                return (pass, team)
            }
            try pass.scan(team)
        }
        for part in parts { try plan(part, nil).run() }
    }

    public func backward(_ problem: BackwardProblem) throws(MFAError) {
        if problem.attention.isEmpty {
            problem.gradients.writeZeros(problem.attention)
            return
        }
        try plan(problem.attention, problem.gradients).run()
    }

    public func finish() throws(MFAError) {}

    public func workspaceSize(forward problem: AttentionProblem) throws(MFAError) -> Int {
        if problem.isEmpty { return 0 }
        return try workspaceSize(FusedParts(problem, threads: threads)?.first ?? problem, nil)
    }

    public func workspaceSize(backward problem: BackwardProblem) throws(MFAError) -> Int {
        if problem.attention.isEmpty { return 0 }
        return try workspaceSize(problem.attention, problem.gradients)
    }

    private func workspaceSize(_ problem: AttentionProblem, _ gradients: AttentionGradients?) throws(MFAError) -> Int {
        var layout = WorkspaceLayout(base: nil)
        _ = try AttentionPlan(problem, gradients, table, threads: threads, &layout)
        return layout.size
    }

    public func kernelName(_ problem: AttentionProblem, _ operation: Operation) throws(MFAError) -> UnsafePointer<CChar> {
        try AttentionPlan.kernel(Step(operation), problem, table).name
    }

    /// A plan whose workspace is there.
    private func plan(_ problem: AttentionProblem, _ gradients: AttentionGradients?) throws(MFAError) -> AttentionPlan {
        try layOut { (layout) throws(MFAError) in try AttentionPlan(problem, gradients, table, threads: threads, &layout) }
    }

    // MARK: Quantisation

    public func quantize(_ problem: QuantizationProblem) throws(MFAError) {
        if !problem.input.hasElements {
            problem.output.writeNeutralScales()
            return
        }
        let (pass, team) = try prepare(problem)
        try pass.scan(team)
        try pass.write(team)
    }

    public func dequantize(_ problem: QuantizationProblem) throws(MFAError) {
        if !problem.input.hasElements { return }
        let (pass, team) = try prepare(problem)
        pass.dequantize(team)
    }

    /// A pass whose workspace is there, and who makes it.
    private func prepare(_ problem: QuantizationProblem) throws(MFAError) -> (QuantizationPass, Team) {
        try layOut { (layout) throws(MFAError) in
            let pass = try QuantizationPass("input", from: problem.input, to: problem.output, table, threads: threads, &layout)
            let team = try Team(threads: threads, items: pass.items, scratchSize: pass.scratchSize, &layout)
            return (pass, team)
        }
    }

    /// Threads with scratch memory that is there.
    func team(items: Int64, scratchSize: Int) throws(MFAError) -> Team {
        try layOut { (layout) throws(MFAError) in try Team(threads: threads, items: items, scratchSize: scratchSize, &layout) }
    }

    /// Lays a call out in the workspace: with the memory that is there, which tells how much it needs, and again if that had to grow.
    private func layOut<Plan>(_ lay: (inout WorkspaceLayout) throws(MFAError) -> Plan) throws(MFAError) -> Plan {
        let guess = workspace.memory
        var layout = WorkspaceLayout(base: guess)
        let plan = try lay(&layout)
        let memory = try workspace.reserve(layout.size)
        if memory == guess { return plan }
        var moved = WorkspaceLayout(base: memory)
        return try lay(&moved)
    }
}

/// The value of an environment variable.
private func environment(_ name: String) -> String? {
    getenv(name).map { String(cString: $0) }
}

extension AttentionGradients {
    /// Writes 0 to every gradient that has elements: those of a problem without query rows.
    func writeZeros(_ problem: AttentionProblem) {
        for tensor in [gradQuery, gradKey, gradValue, gradMask] {
            if let tensor { tensor.writeZeros() }
        }
        let bytes = problem.numHeads * problem.statisticSize
        if let gradSinks { memset(gradSinks, 0, bytes) }
        if let gradAlibiSlopes { memset(gradAlibiSlopes, 0, bytes) }
    }
}

extension Tensor {
    /// Writes scales of 1, zero points and means of 0: those of values that do not exist.
    fileprivate func writeNeutralScales() {
        guard let quantization,
            let layout = ScaleLayout(
                quantization.granularity, shape: shape, blockSize: quantization.blockSize, groupSize: quantization.groupSize)
        else { return }
        quantization.scales?.update(repeating: 1, count: layout.count)
        quantization.zeroPoints?.update(repeating: 0, count: layout.count)
        quantization.channelMeans?.update(repeating: 0, count: shape[0] * shape[1] * shape[3])
    }

    /// Writes 0 to every element, of a float type.
    fileprivate func writeZeros() {
        guard hasElements, let address else { return }
        let unit = precision.unitSize
        for batch in 0..<shape[0] {
            for head in 0..<shape[1] {
                for token in 0..<shape[2] {
                    let row = address + (batch * strides[0] + head * strides[1] + token * strides[2]) * unit
                    for channel in 0..<shape[3] { memset(row + channel * strides[3] * unit, 0, unit) }
                }
            }
        }
    }
}
