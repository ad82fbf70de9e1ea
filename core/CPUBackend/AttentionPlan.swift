import CPUKernels
import MFACore

/// How a problem is computed: the kernels in their order, what they get, and where in the workspace everything lies.
///
/// A plan is made twice where the workspace has to grow: first to learn its size, then with its address.
struct AttentionPlan {
    private let attention: cpu_attention
    private let kernels: [cpu_attention_kernel]
    private let fused: [QuantizationPass]
    private let team: Team

    /// Forward, or backward where there are gradients.
    init(
        _ problem: AttentionProblem, _ gradients: AttentionGradients?, _ table: KernelTable, threads: Int32,
        _ layout: inout WorkspaceLayout
    ) throws(MFAError) {
        var (attention, fused) = try AttentionPlan.describe(problem, table, threads: threads, &layout)
        var steps: [Step] = []
        if let gradients {
            let dValues: UnsafeMutableRawPointer
            if let given = gradients.dValues {
                dValues = given
            } else {
                dValues = try layout.take(problem.rowCount, of: problem.statisticSize)
            }
            attention.add(gradients, dValues: dValues)
            if !gradients.dValuesGiven { steps.append(.dValues) }
            let wantsQuery = gradients.gradQuery != nil, wantsKeyValue = gradients.gradKey != nil || gradients.gradValue != nil
            if (wantsQuery || wantsKeyValue) && table.find(.backward, problem.arithmetic, for: &attention) != nil {
                steps.append(.backward)
            } else {
                if wantsQuery { steps.append(.backwardQuery) }
                if wantsKeyValue { steps.append(.backwardKeyValue) }
            }
            if gradients.wantsBias { steps.append(.backwardBias) }
        } else {
            steps.append(.forward)
        }

        var kernels: [cpu_attention_kernel] = []
        for step in steps { kernels.append(try table.kernel(step, problem.arithmetic, for: &attention)) }
        let sharedSizes = withUnsafePointer(to: attention) { attention in
            kernels.map { Int(clamping: $0.shared_bytes?(attention) ?? 0) }
        }
        // Kernels run one after the other, so one piece serves them all.
        attention.shared = try layout.take(sharedSizes.max() ?? 0)

        var items: Int64 = 0
        var scratchSize = 0
        for pass in fused {
            items = max(items, pass.items)
            scratchSize = max(scratchSize, pass.scratchSize)
        }
        withUnsafePointer(to: attention) { attention in
            for kernel in kernels {
                items = max(
                    items, kernel.item_count(attention), kernel.prepare_items?(attention) ?? 0, kernel.finish_items?(attention) ?? 0)
                scratchSize = max(scratchSize, Int(clamping: kernel.workspace_bytes(attention)))
            }
        }
        team = try Team(threads: threads, items: items, scratchSize: scratchSize, &layout)
        self.attention = attention
        self.kernels = kernels
        self.fused = fused
    }

    /// The problem as kernels see it, and what quantises the operands that come as floats.
    private static func describe(
        _ problem: AttentionProblem, _ table: KernelTable, threads: Int32, _ layout: inout WorkspaceLayout
    ) throws(MFAError) -> (cpu_attention, [QuantizationPass]) {
        var attention = cpu_attention(problem)
        attention.threads = threads
        let lengths = problem.options.kvLengths
        var fused: [QuantizationPass] = []
        if let scheme = problem.options.quantizeQuery {
            let codes = try FusedOperand("query", problem.query, scheme: scheme, lengths: nil, table, threads: threads, &layout)
            attention.query = codes.tensor
            fused.append(codes.pass)
        }
        if let scheme = problem.options.quantizeKey {
            let codes = try FusedOperand("key", problem.key, scheme: scheme, lengths: lengths, table, threads: threads, &layout)
            attention.key = codes.tensor
            fused.append(codes.pass)
        }
        if let scheme = problem.options.quantizeValue {
            let codes = try FusedOperand(
                "value", problem.value, scheme: scheme, lengths: lengths, table, threads: threads, &layout)
            attention.value = codes.tensor
            fused.append(codes.pass)
        }
        return (attention, fused)
    }

    /// The kernel that a problem would use for a step.
    static func kernel(_ step: Step, _ problem: AttentionProblem, _ table: KernelTable) throws(MFAError) -> cpu_attention_kernel {
        var layout = WorkspaceLayout(base: nil)
        var (attention, _) = try describe(problem, table, threads: 1, &layout)
        return try table.kernel(step, problem.arithmetic, for: &attention)
    }

    /// Computes it all. Throws before anything is written, if an operand that is to be quantised is not finite.
    func run() throws(MFAError) {
        for pass in fused { try pass.writeWorkspace(team) }
        withUnsafePointer(to: attention) { for kernel in kernels { team.run(kernel, $0) } }
    }
}
