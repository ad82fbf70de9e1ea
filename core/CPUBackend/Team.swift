import CPUKernels
import MFACore

/// The threads of a call, each with scratch memory of its own.
struct Team {
    let threads: Int32
    /// Of thread 0; the others' follow.
    private let scratch: UnsafeMutableRawPointer
    /// Bytes from one thread's to the next's.
    private let scratchSize: Int

    /// At most `threads`, and no more than there are items for.
    init(threads: Int32, items: Int64, scratchSize: Int, _ layout: inout WorkspaceLayout) throws(MFAError) {
        self.threads = Int32(min(Int64(threads), max(items, 1)))
        self.scratchSize = try WorkspaceLayout.round(scratchSize)
        scratch = try layout.take(Int(self.threads), of: self.scratchSize)
    }

    func scratch(of thread: Int32) -> UnsafeMutableRawPointer { scratch + Int(thread) * scratchSize }

    /// Runs an attention kernel: its preparation, its items, and what comes after them.
    func run(_ kernel: cpu_attention_kernel, _ attention: UnsafePointer<cpu_attention>) {
        struct Work {
            let team: Team
            let kernel: cpu_attention_kernel
            let attention: UnsafePointer<cpu_attention>
        }
        let work = Work(team: self, kernel: kernel, attention: attention)
        if let items = kernel.prepare_items?(attention) {
            run(items, work) { state, item, thread in
                guard let work = state?.assumingMemoryBound(to: Work.self).pointee else { return }
                work.kernel.prepare?(work.attention, item, work.team.scratch(of: thread))
            }
        }
        run(kernel.item_count(attention), work) { state, item, thread in
            guard let work = state?.assumingMemoryBound(to: Work.self).pointee else { return }
            work.kernel.run(work.attention, item, work.team.scratch(of: thread))
        }
        if let items = kernel.finish_items?(attention) {
            run(items, work) { state, item, thread in
                guard let work = state?.assumingMemoryBound(to: Work.self).pointee else { return }
                work.kernel.finish?(work.attention, item, work.team.scratch(of: thread))
            }
        }
    }

    /// Runs `task` once for each item; its state is the address of `work`.
    func run<Work>(_ items: Int64, _ work: Work, _ task: @convention(c) (UnsafeMutableRawPointer?, Int64, Int32) -> Void) {
        var work = work
        withUnsafeMutablePointer(to: &work) { cpu_parallel_for(threads, items, task, $0) }
    }
}
