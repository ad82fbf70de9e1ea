import CPUBackend
import MFACore
import Metal

/// One forward problem as the device gets it: everything it reads and writes lies in buffers of its own or that it shares with the host.
struct AttentionCall: DeviceCall {
    private let problem: AttentionProblem
    private let kernel: AttentionKernel
    private let pipeline: any MTLComputePipelineState
    private let arguments: AttentionArguments
    private let results: DeviceResults

    /// Takes all memory that the call needs, and reads the operands that have to be copied. If the call is deferred none have, by
    /// `checkLocations`, and nothing is read.
    init(
        _ problem: AttentionProblem, _ kernel: AttentionKernel, _ memory: DeviceMemory, _ library: inout KernelLibrary,
        isDeferred: Bool = false
    ) throws(MFAError) {
        guard let output = problem.output else { throw .argument("`output` must not be NULL") }
        self.problem = problem
        self.kernel = kernel
        pipeline = try library.pipeline(
            "\(kernel.name)", of: .attentionForward, AttentionKernelOptions(problem, isDeferred: isDeferred).constants)
        var arguments = try AttentionArguments(problem, memory, &library, isDeferred: isDeferred)
        var results = DeviceResults()
        (arguments.bindings[5], arguments.parameters.output) = try results.add(output, memory)
        if let logsumexp = problem.logsumexp {
            arguments.bindings[6] = try results.add(logsumexp, size: problem.rowCount * MemoryLayout<Float>.size, memory)
        }
        self.arguments = arguments
        self.results = results
    }

    /// Binds everything and dispatches the kernels.
    func encode(_ encoder: any MTLComputeCommandEncoder) {
        arguments.encodePasses(encoder)
        encoder.setComputePipelineState(pipeline)
        encoder.setParameters(arguments.parameters, index: 0)
        arguments.bindings.set(encoder)
        let rows = 32
        let blocks = (problem.headDimV + kernel.channels - 1) / kernel.channels
        encoder.dispatchThreadgroups(
            MTLSize(width: (problem.seqLenQ + rows - 1) / rows, height: problem.numHeads * blocks, depth: problem.batchSize),
            threadsPerThreadgroup: MTLSize(width: 128, height: 1, depth: 1))
    }

    /// Gives the caller the results, or has the CPU compute them.
    func finish(_ cpu: CPUBackend) throws(MFAError) {
        try arguments.checkPasses()
        guard arguments.needsCare else { return results.copy() }
        do throws(MFAError) {
            try cpu.forward(problem)
        } catch {
            // Too late for another status: where results are not copied, the device has written them.
            throw MFAError(.executionFailed, error.message)
        }
    }
}
