import CPUKernels
import MFACore

extension cpu_merge {
    init(_ problem: MergeProblem) {
        self.init()
        batch_size = Int64(problem.shape[0])
        num_heads = Int64(problem.shape[1])
        seq_len = Int64(problem.shape[2])
        head_dim = Int64(problem.shape[3])
        output_a = cpu_tensor(problem.outputA)
        output_b = cpu_tensor(problem.outputB)
        output = cpu_tensor(problem.output)
        logsumexp_a = UnsafeRawPointer(problem.logsumexpA)
        logsumexp_b = UnsafeRawPointer(problem.logsumexpB)
        logsumexp = problem.logsumexp
        double_statistics = problem.statisticsPrecision == .fp64
    }

    /// One for each head of each sequence.
    var items: Int64 { batch_size * num_heads }
}

/// What a merge's threads share.
private struct MergeWork {
    let merge: UnsafePointer<cpu_merge>
    let team: Team
}

extension CPUBackend {
    public func merge(_ problem: MergeProblem) throws(MFAError) {
        guard problem.shape[0] > 0 && problem.shape[2] > 0 else { return }
        var merge = cpu_merge(problem)
        let team = try team(items: merge.items, scratchSize: Int(clamping: cpu_merge_workspace_bytes(&merge)))
        withUnsafePointer(to: merge) { merge in
            team.run(merge.pointee.items, MergeWork(merge: merge, team: team)) { state, item, thread in
                guard let work = state?.assumingMemoryBound(to: MergeWork.self).pointee else { return }
                cpu_merge_run(work.merge, item, work.team.scratch(of: thread))
            }
        }
    }
}
