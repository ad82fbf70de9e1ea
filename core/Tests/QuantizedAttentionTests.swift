import MFA
import Testing

/// The public Swift interface.
@Suite struct QuantizedAttentionTests {
    private let batch = 2
    private let heads = 4
    private let kvHeads = 2
    private let rows = 7
    private let columns = 11
    private let channels = 16

    private func tensor(_ numbers: Numbers, heads: Int, tokens: Int) -> Tensor {
        Tensor(numbers.raw, precision: .fp32, shape: Shape(batch, heads, tokens, channels), layout: .bshd)
    }

    @Test func forwardIsWhatTheFormulasSay() throws {
        let query = Numbers.random(batch * rows * heads * channels, seed: 1)
        let key = Numbers.random(batch * columns * kvHeads * channels, seed: 2)
        let value = Numbers.random(batch * columns * kvHeads * channels, seed: 3)
        let output = Numbers(query.count)
        let logsumexp = Numbers(batch * heads * rows)
        let attention = QuantizedAttention(context: try Context(threads: 2))
        for causal in [false, true] {
            var options = AttentionOptions()
            options.causal = causal
            try attention.forward(
                query: tensor(query, heads: heads, tokens: rows), key: tensor(key, heads: kvHeads, tokens: columns),
                value: tensor(value, heads: kvHeads, tokens: columns), output: tensor(output, heads: heads, tokens: rows),
                logsumexp: logsumexp.raw, options: options)
            let expected = naiveAttention(
                query.values, key.values, value.values, batch: batch, heads: heads, kvHeads: kvHeads, rows: rows, columns: columns,
                channels: channels, scale: 0.25, causal: causal)
            #expect(distance(output.values, expected.output) < 1e-5)
            #expect(distance(logsumexp.values, expected.logsumexp) < 1e-5)
        }
    }

    @Test func gradientsInTwoCallsAreThoseOfOne() throws {
        let query = Numbers.random(batch * rows * heads * channels, seed: 1)
        let key = Numbers.random(batch * columns * kvHeads * channels, seed: 2)
        let gradOutput = Numbers.random(query.count, seed: 4)
        let output = Numbers(query.count)
        let statistics = [Numbers(batch * heads * rows), Numbers(batch * heads * rows)]
        let inTwo = [Numbers(query.count), Numbers(key.count), Numbers(key.count)]
        let inOne = [Numbers(query.count), Numbers(key.count), Numbers(key.count)]
        let attention = QuantizedAttention(context: try Context())
        let q = tensor(query, heads: heads, tokens: rows)
        let k = tensor(key, heads: kvHeads, tokens: columns)
        let gradient = tensor(gradOutput, heads: heads, tokens: rows)
        try attention.forward(query: q, key: k, value: k, output: tensor(output, heads: heads, tokens: rows), logsumexp: statistics[0].raw)
        try attention.backwardQuery(
            query: q, key: k, value: k, logsumexp: statistics[0].raw, gradOutput: gradient,
            gradQuery: tensor(inTwo[0], heads: heads, tokens: rows), dValues: statistics[1].raw)
        try attention.backwardKeyValue(
            query: q, key: k, value: k, logsumexp: statistics[0].raw, gradOutput: gradient, dValues: statistics[1].raw,
            gradKey: tensor(inTwo[1], heads: kvHeads, tokens: columns), gradValue: tensor(inTwo[2], heads: kvHeads, tokens: columns))
        var request = GradientRequest()
        request.gradOutput = gradient
        request.gradQuery = tensor(inOne[0], heads: heads, tokens: rows)
        request.gradKey = tensor(inOne[1], heads: kvHeads, tokens: columns)
        request.gradValue = tensor(inOne[2], heads: kvHeads, tokens: columns)
        try attention.backward(query: q, key: k, value: k, logsumexp: statistics[0].raw, gradients: request)
        for (two, one) in zip(inTwo, inOne) {
            #expect(two.values == one.values)
            #expect(!two.isUntouched)
        }
    }

    @Test func quantisedOperandsComeBackThroughTheirScales() throws {
        let numbers = Numbers.random(batch * columns * kvHeads * channels, seed: 5)
        let back = Numbers(numbers.count)
        let scales = Numbers(batch * kvHeads * columns)
        let context = try Context()
        let shape = Shape(batch, kvHeads, columns, channels)
        for (precision, bound) in [(Precision.int8, Float(0.5 / 127)), (.int4, 0.5 / 7)] {
            let codes = try context.makeBuffer(size: numbers.count)
            let quantised = Tensor(
                codes, precision: precision, shape: shape, strides: Layout.bhsd.strides(shape: shape, precision: precision),
                quantization: Quantization(granularity: .token, scales: scales.pointer))
            try context.quantize(tensor(numbers, heads: kvHeads, tokens: columns), into: quantised)
            try context.dequantize(quantised, into: tensor(back, heads: kvHeads, tokens: columns))
            #expect(zip(numbers.values, back.values).allSatisfy { abs($0 - $1) <= bound * 1.0001 })
        }
    }

    @Test func errorsAreTyped() throws {
        let numbers = Numbers.random(batch * rows * heads * channels, seed: 1)
        let attention = QuantizedAttention(context: try Context())
        let query = tensor(numbers, heads: heads, tokens: rows)
        do throws(MFAError) {
            try attention.forward(query: query, key: query, value: query, output: query)
            Issue.record("an output that is its own input must be refused")
        } catch {
            #expect(error.status == .invalidArgument)
            #expect(error.message.contains("`output`"))
        }
        #expect(throws: MFAError(.deviceUnavailable, "the device \"metal\" is not served by this build of the library")) {
            _ = try Context(device: .metal)
        }
    }

    @Test func viewsIntoBuffersAreChecked() throws {
        let context = try Context()
        let attention = QuantizedAttention(context: context)
        let shape = Shape(1, 1, 4, 8)
        let strides = Layout.bhsd.strides(shape: shape, precision: .fp32)
        let buffer = try context.makeBuffer(size: 2 * 4 * 8 * 4)
        let first = Tensor(buffer, precision: .fp32, shape: shape, strides: strides)
        let second = Tensor(buffer, offset: 128, precision: .fp32, shape: shape, strides: strides)
        try attention.forward(query: first, key: first, value: first, output: second)
        for offset in [132, 129, -4, 256, Int.max] {
            let outside = Tensor(buffer, offset: offset, precision: .fp32, shape: shape, strides: strides)
            do throws(MFAError) {
                try attention.forward(query: first, key: first, value: first, output: outside)
                Issue.record("offset \(offset) must be refused")
            } catch {
                #expect(error.status == .invalidDimensions)
            }
        }
    }

    @Test func kernelsAreNamed() throws {
        let context = try Context()
        let numbers = Numbers.random(batch * rows * heads * channels, seed: 1)
        let query = tensor(numbers, heads: heads, tokens: rows)
        let output = tensor(Numbers(numbers.count), heads: heads, tokens: rows)
        let request = AttentionRequest(query: query, key: query, value: query, output: output, logsumexp: nil)
        #expect(try context.kernelName(request, .forward).hasPrefix("attention_forward_"))
        #expect(try context.kernelName(request, .backwardQuery).hasPrefix("attention_backward_"))
    }
}
