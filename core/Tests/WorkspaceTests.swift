import CMFA
import Testing

/// Workspace comes from the context's allocator, is kept, only grows, and is all taken before an output byte is written.
@Suite struct WorkspaceTests {
    /// A call of the general interface on contiguous float tensors, with all gradients and everything quantised on the way in.
    private final class Problem {
        let rows: Int
        let query, key, value, output, logsumexp, gradOutput, gradQuery, gradKey, gradValue: Numbers
        static let (batch, heads, columns, channels) = (2, 2, 9, 8)

        init(rows: Int) {
            self.rows = rows
            let (batch, heads, columns, channels) = (Problem.batch, Problem.heads, Problem.columns, Problem.channels)
            let (left, right) = (batch * heads * rows * channels, batch * heads * columns * channels)
            query = .random(left, seed: 1)
            key = .random(right, seed: 2)
            value = .random(right, seed: 3)
            gradOutput = .random(left, seed: 4)
            output = Numbers(left)
            logsumexp = Numbers(batch * heads * rows)
            gradQuery = Numbers(left)
            gradKey = Numbers(right)
            gradValue = Numbers(right)
        }

        private func tensor(_ numbers: Numbers, tokens: Int) -> mfa_tensor_t {
            var tensor = mfa_tensor_t()
            tensor.struct_size = UInt32(MemoryLayout<mfa_tensor_t>.size)
            tensor.precision = MFA_PRECISION_FP32
            tensor.data = numbers.raw
            let (heads, channels) = (Int64(Problem.heads), Int64(Problem.channels))
            tensor.shape = (Int64(Problem.batch), heads, Int64(tokens), channels)
            tensor.strides = (heads * Int64(tokens) * channels, Int64(tokens) * channels, channels, 1)
            return tensor
        }

        func run(_ body: (UnsafePointer<mfa_attention_t>, UnsafePointer<mfa_attention_gradients_t>) -> Int32, fused: Bool) -> Int32 {
            var scheme = mfa_quantization_scheme_t()
            scheme.struct_size = UInt32(MemoryLayout<mfa_quantization_scheme_t>.size)
            scheme.precision = MFA_PRECISION_INT8
            scheme.granularity = MFA_GRANULARITY_TOKEN
            var tensors = [tensor(query, tokens: rows), tensor(key, tokens: Problem.columns), tensor(value, tokens: Problem.columns)]
            tensors += [tensor(output, tokens: rows), tensor(gradOutput, tokens: rows), tensor(gradQuery, tokens: rows)]
            tensors += [tensor(gradKey, tokens: Problem.columns), tensor(gradValue, tokens: Problem.columns)]
            return tensors.withUnsafeBufferPointer { tensors in
                withUnsafePointer(to: scheme) { scheme in
                    let first = tensors.baseAddress
                    var attention = mfa_attention_t()
                    _ = mfa_attention_initialize(&attention, UInt32(MemoryLayout<mfa_attention_t>.size))
                    attention.query = first
                    attention.key = first.map { $0 + 1 }
                    attention.value = first.map { $0 + 2 }
                    attention.output = first.map { $0 + 3 }
                    attention.logsumexp = logsumexp.raw
                    if fused { (attention.quantize_query, attention.quantize_key, attention.quantize_value) = (scheme, scheme, scheme) }
                    var gradients = mfa_attention_gradients_t()
                    gradients.struct_size = UInt32(MemoryLayout<mfa_attention_gradients_t>.size)
                    gradients.grad_output = first.map { $0 + 4 }
                    gradients.grad_query = first.map { $0 + 5 }
                    gradients.grad_key = first.map { $0 + 6 }
                    gradients.grad_value = first.map { $0 + 7 }
                    return body(&attention, &gradients)
                }
            }
        }

        func forward(_ context: ForeignContext, fused: Bool = true) -> Int32 {
            run({ attention, _ in mfa_attention_run_forward(context.handle, attention) }, fused: fused)
        }

        func backward(_ context: ForeignContext, fused: Bool = true) -> Int32 {
            run({ mfa_attention_run_backward(context.handle, $0, $1) }, fused: fused)
        }

        func workspaceSize(_ context: ForeignContext, backward: Bool, fused: Bool = true) -> UInt64 {
            var size: UInt64 = 0
            #expect(run({ mfa_attention_workspace_size(context.handle, $0, backward ? $1 : nil, &size) }, fused: fused) == MFA_SUCCESS)
            return size
        }

        var gradientsAreUntouched: Bool { gradQuery.isUntouched && gradKey.isUntouched && gradValue.isUntouched }
    }

    @Test func isKeptAndGivenBack() throws {
        let allocator = CountingAllocator()
        do {
            let context = try ForeignContext(threads: 2, allocator: allocator)
            let small = Problem(rows: 3)
            let large = Problem(rows: 3000)
            #expect(large.forward(context) == MFA_SUCCESS)
            let held = allocator.held
            let allocations = allocator.allocations
            #expect(held > 0)
            #expect(large.workspaceSize(context, backward: false) == UInt64(held))
            for _ in 0..<10 {
                #expect(small.forward(context) == MFA_SUCCESS)
                #expect(large.forward(context) == MFA_SUCCESS)
            }
            #expect(allocator.allocations == allocations, "nothing more is needed")
            #expect(allocator.held == held)
            #expect(large.backward(context) == MFA_SUCCESS)
            #expect(UInt64(allocator.held) == max(UInt64(held), large.workspaceSize(context, backward: true)))
            var info = mfa_context_info_t()
            info.struct_size = UInt32(MemoryLayout<mfa_context_info_t>.size)
            #expect(mfa_context_get_info(context.handle, &info) == MFA_SUCCESS)
            #expect(info.workspace_bytes == UInt64(allocator.held))
        }
        #expect(allocator.held == 0)
    }

    @Test(arguments: [false, true]) func failuresWriteNothing(fused: Bool) throws {
        let allocator = CountingAllocator()
        let context = try ForeignContext(allocator: allocator)
        let problem = Problem(rows: 5)
        allocator.failing = allocator.allocations
        #expect(problem.forward(context, fused: fused) == MFA_ERROR_ALLOCATION_FAILED)
        #expect(problem.output.isUntouched && problem.logsumexp.isUntouched)
        #expect(problem.forward(context, fused: fused) == MFA_SUCCESS, "the context stays usable")
        // More rows need a larger workspace: d_values are kept in it.
        let larger = Problem(rows: 50_000)
        allocator.failing = allocator.allocations
        #expect(larger.backward(context, fused: fused) == MFA_ERROR_ALLOCATION_FAILED)
        #expect(larger.gradientsAreUntouched)
        #expect(problem.backward(context, fused: fused) == MFA_SUCCESS)
        #expect(!problem.gradientsAreUntouched)
    }

    @Test func fusedInputsAreCheckedBeforeAnythingIsWritten() throws {
        let context = try ForeignContext()
        for path in [\Problem.query, \.key, \.value] {
            let problem = Problem(rows: 4)
            problem[keyPath: path].pointer[7] = .nan
            #expect(problem.forward(context) == MFA_ERROR_INVALID_ARGUMENT)
            #expect(context.lastError.contains("finite"))
            #expect(problem.output.isUntouched && problem.logsumexp.isUntouched)
            #expect(problem.backward(context) == MFA_ERROR_INVALID_ARGUMENT)
            #expect(problem.gradientsAreUntouched)
        }
    }

    @Test func inputsComeBeforeWorkspace() throws {
        let allocator = CountingAllocator()
        allocator.failing = 0
        let context = try ForeignContext(allocator: allocator)
        let problem = Problem(rows: 4)
        problem.value.pointer[100] = -.infinity
        #expect(problem.forward(context) == MFA_ERROR_INVALID_ARGUMENT)
        allocator.failing = allocator.allocations
        #expect(problem.backward(context) == MFA_ERROR_INVALID_ARGUMENT)
        problem.value.pointer[100] = 1
        allocator.failing = allocator.allocations
        #expect(problem.forward(context) == MFA_ERROR_ALLOCATION_FAILED)
        #expect(problem.output.isUntouched && problem.gradientsAreUntouched)
    }

    @Test func growsWithTheLengthsNotTheirProduct() throws {
        let context = try ForeignContext()
        let sizes = [1000, 2000, 4000].map { Problem(rows: $0).workspaceSize(context, backward: true) }
        #expect(sizes[2] < 2 * sizes[1] + 1 && sizes[1] < 2 * sizes[0] + 1)
    }

    @Test func resultsDoNotDependOnThreads() throws {
        var results: [[Float]] = []
        for threads in [1, 2, 3, 7] as [UInt32] {
            let context = try ForeignContext(threads: threads)
            let problem = Problem(rows: 37)
            #expect(problem.forward(context) == MFA_SUCCESS)
            #expect(problem.backward(context) == MFA_SUCCESS)
            results.append(
                problem.output.values + problem.logsumexp.values + problem.gradQuery.values + problem.gradKey.values
                    + problem.gradValue.values)
        }
        for result in results { #expect(result.map(\.bitPattern) == results[0].map(\.bitPattern)) }
    }
}
