import CPUKernels
import MFACore

/// How a problem is computed: the kernels in their order, what they get, and where in the workspace everything lies.
///
/// A plan is made twice where the workspace has to grow: first to learn its size, then with its address.
struct AttentionPlan {
    private var attention: cpu_attention
    private var kernels: [cpu_attention_kernel] = []
    private var fused: [QuantizationPass] = []
    private var team: Team
    /// The bytes of workspace that it needs.
    let workspaceSize: Int

    /// Forward, or backward where there are gradients.
    init(
        _ problem: AttentionProblem, _ gradients: AttentionGradients?, _ table: KernelTable, threads: Int32, base: UnsafeMutableRawPointer?
    ) throws(MFAError) {
        var layout = WorkspaceLayout(base: base)
        let options = problem.options
        let query = try FusedOperand(
            "query", problem.query, scheme: options.quantizeQuery, lengths: nil, threads: threads, &layout)
        let key = try FusedOperand(
            "key", problem.key, scheme: options.quantizeKey, lengths: options.kvLengths, threads: threads, &layout)
        let value = try FusedOperand(
            "value", problem.value, scheme: options.quantizeValue, lengths: options.kvLengths, threads: threads, &layout)
        attention = cpu_attention(
            problem, query: query?.codes ?? problem.query, key: key?.codes ?? problem.key, value: value?.codes ?? problem.value)
        for operand in [query, key, value] {
            if let operand { fused.append(operand.pass) }
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

        var scratchSize = fused.map(\.scratchSize).max() ?? 0
        for kernel in kernels {
            let size = withUnsafePointer(to: attention) { kernel.workspace_bytes($0) }
            scratchSize = max(scratchSize, Int(clamping: size))
        }
        // Whole cache lines, so that no two threads write to the same.
        if scratchSize > Int.max - Workspace.alignment { throw MFAError(.allocationFailed, "the workspace needed exceeds 2^63 - 1 bytes") }
        scratchSize = (scratchSize + Workspace.alignment - 1) & ~(Workspace.alignment - 1)
        let scratch = try layout.take(Int(threads), of: scratchSize)
        team = Team(threads: threads, scratch: scratch, scratchSize: scratchSize)
        workspaceSize = layout.size
    }

    /// Computes it all. Throws before anything is written, if an operand that is to be quantised is not finite.
    func run() throws(MFAError) {
        for pass in fused { try pass.scan(team) }
        for pass in fused { pass.write(team) }
        withUnsafePointer(to: attention) { for kernel in kernels { team.run(kernel, $0) } }
    }
}
