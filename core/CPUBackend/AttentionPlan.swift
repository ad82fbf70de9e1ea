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
    /// The bytes of workspace that it needs.
    let workspaceSize: Int

    /// Forward, or backward where there are gradients.
    init(
        _ problem: AttentionProblem, _ gradients: AttentionGradients?, _ table: KernelTable, threads: Int32, base: UnsafeMutableRawPointer?
    ) throws(MFAError) {
        var layout = WorkspaceLayout(base: base)
        let options = problem.options
        var attention = cpu_attention(problem)
        var kernels: [cpu_attention_kernel] = []
        var fused: [QuantizationPass] = []
        if let scheme = options.quantizeQuery {
            let codes = try FusedOperand("query", problem.query, scheme: scheme, lengths: nil, table, threads: threads, &layout)
            attention.query = codes.tensor
            fused.append(codes.pass)
        }
        if let scheme = options.quantizeKey {
            let codes = try FusedOperand("key", problem.key, scheme: scheme, lengths: options.kvLengths, table, threads: threads, &layout)
            attention.key = codes.tensor
            fused.append(codes.pass)
        }
        if let scheme = options.quantizeValue {
            let codes = try FusedOperand(
                "value", problem.value, scheme: scheme, lengths: options.kvLengths, table, threads: threads, &layout)
            attention.value = codes.tensor
            fused.append(codes.pass)
        }
        if let gradients {
            let dValues: UnsafeMutableRawPointer
            if let given = gradients.dValues {
                dValues = given
            } else {
                dValues = try layout.take(problem.rowCount, of: problem.statisticSize)
            }
            attention.add(gradients, dValues: dValues)
            if !gradients.dValuesGiven { kernels.append(try table.kernel(.dValues, for: problem)) }
            if gradients.gradQuery != nil { kernels.append(try table.kernel(.backwardQuery, for: problem)) }
            if gradients.gradKey != nil || gradients.gradValue != nil { kernels.append(try table.kernel(.backwardKeyValue, for: problem)) }
            if gradients.wantsBias { kernels.append(try table.kernel(.backwardBias, for: problem)) }
        } else {
            kernels.append(try table.kernel(.forward, for: problem))
        }

        var items: Int64 = 0
        var scratchSize = 0
        for pass in fused {
            items = max(items, pass.items)
            scratchSize = max(scratchSize, pass.scratchSize)
        }
        withUnsafePointer(to: attention) { attention in
            for kernel in kernels {
                items = max(items, kernel.item_count(attention))
                scratchSize = max(scratchSize, Int(clamping: kernel.workspace_bytes(attention)))
            }
        }
        team = try Team(threads: threads, items: items, scratchSize: scratchSize, &layout)
        workspaceSize = layout.size
        self.attention = attention
        self.kernels = kernels
        self.fused = fused
    }

    /// Computes it all. Throws before anything is written, if an operand that is to be quantised is not finite.
    func run() throws(MFAError) {
        for pass in fused { try pass.scan(team) }
        for pass in fused { pass.write(team) }
        withUnsafePointer(to: attention) { for kernel in kernels { team.run(kernel, $0) } }
    }
}
