import CMFA
import Testing

/// Every status of a flat call, their order, and that a refused call writes nothing.
@Suite struct StatusTests {
    let context: ForeignContext
    let query = Numbers.random(8, seed: 1)
    let key = Numbers.random(12, seed: 2)
    let value = Numbers.random(12, seed: 3)
    let output = Numbers(8)
    let logsumexp = Numbers(2)
    var call = FlatArguments()

    init() throws {
        context = try ForeignContext()
        call.query = query.raw
        call.key = key.raw
        call.value = value.raw
        call.output = output.raw
        call.logsumexp = logsumexp.raw
    }

    /// Expects a status, a message that names the argument, and that no output byte changed.
    func expect(_ status: Int32, _ argument: String, _ call: FlatArguments, _ comment: Comment? = nil) {
        #expect(call.forward(context.raw) == status, comment)
        if status != MFA_SUCCESS {
            #expect(context.lastError.hasPrefix("mfa_attention_forward_quantized: "), comment)
            #expect(context.lastError.contains("`\(argument)"), "\(context.lastError)")
            #expect(output.isUntouched && logsumexp.isUntouched, comment)
        }
    }

    @Test func aLegalCallSucceeds() {
        #expect(call.forward(context.raw) == MFA_SUCCESS)
        let expected = naiveAttention(
            query.values, key.values, value.values, batch: 1, heads: 1, kvHeads: 1, rows: 2, columns: 3, channels: 4, scale: 0.5)
        #expect(distance(output.values, expected.output) < 1e-6)
        #expect(distance(logsumexp.values, expected.logsumexp) < 1e-6)
    }

    @Test func contextsAreCheckedFirst() {
        var bad = call
        bad.numHeads = 0
        bad.query = nil
        #expect(bad.forward(nil) == MFA_ERROR_INVALID_CONTEXT)
        #expect(mfa_last_error(nil).map { String(cString: $0) } == "mfa_attention_forward_quantized: `context` must not be NULL")
        #expect(bad.forward(UnsafeMutableRawPointer(bitPattern: 0x1234_5678)) == MFA_ERROR_INVALID_CONTEXT)
        #expect(bad.forward(query.raw) == MFA_ERROR_INVALID_CONTEXT)
    }

    @Test func sizesAreCheckedBeforePointers() {
        var bad = call
        bad.query = nil
        bad.precisions.0 = 99
        for (heads, channels) in [(0, 4), (1, 0), (1, 1025), (0, 0)] as [(UInt32, UInt16)] {
            bad.numHeads = heads
            bad.headDim = channels
            expect(MFA_ERROR_INVALID_DIMENSIONS, heads == 0 ? "num_heads" : "head_dim", bad, "\(heads) heads of \(channels)")
        }
        bad = call
        bad.query = nil
        bad.batchSize = .max
        bad.seqLenQ = .max
        bad.numHeads = .max
        expect(MFA_ERROR_INVALID_DIMENSIONS, "query_ptr", bad, "the product overflows")
    }

    @Test func productsAreCheckedAtEightBytes() {
        // 2^60 elements: 2^63 bytes at 8, though only 2^60 at 1.
        var bad = call
        bad.precisions = (MFA_PRECISION_INT8, MFA_PRECISION_INT8, MFA_PRECISION_INT8)
        bad.batchSize = 1 << 30
        bad.seqLenQ = 1 << 28
        bad.headDim = 4
        expect(MFA_ERROR_INVALID_DIMENSIONS, "query_ptr", bad)
    }

    @Test func pointersAreCheckedBeforeCodes() {
        for (name, path) in [
            ("query_ptr", \FlatArguments.query), ("key_ptr", \.key), ("value_ptr", \.value), ("output_ptr", \.output),
        ] {
            var bad = call
            bad.precisions = (7, 7, 7)
            bad[keyPath: path] = nil
            expect(MFA_ERROR_INVALID_ARGUMENT, name, bad)
        }
        var bad = call
        bad.logsumexp = logsumexp.raw + 1
        expect(MFA_ERROR_INVALID_ARGUMENT, "logsumexp_ptr", bad)
    }

    @Test func codesAndScalars() {
        var bad = call
        bad.softmaxScale = .nan
        for code in [-1, 5, 7, 16, 99, Int32.max] {
            bad.precisions.1 = code
            expect(MFA_ERROR_INVALID_ARGUMENT, "k_precision", bad, "code \(code)")
        }
        for scale in [Float.nan, .infinity, -.infinity] {
            bad = call
            bad.softmaxScale = scale
            expect(MFA_ERROR_INVALID_ARGUMENT, "softmax_scale", bad)
        }
        for scale in [Float.nan, .infinity, 0, -1] {
            bad = call
            bad.precisions.2 = MFA_PRECISION_INT8
            bad.scales.2 = scale
            expect(MFA_ERROR_INVALID_ARGUMENT, "v_scale", bad)
        }
        bad = call
        bad.scales = (.nan, 0, -1)
        expect(MFA_SUCCESS, "", bad, "scales of float operands are ignored")
    }

    @Test func zeroAndNegativeScalesOfScoresAreLegal() {
        for scale in [Float(0), -0.5] {
            var legal = call
            legal.softmaxScale = scale
            #expect(legal.forward(context.raw) == MFA_SUCCESS)
        }
    }

    @Test func outputsOverlapNothing() {
        for path in [\FlatArguments.query, \.key, \.value, \.logsumexp] {
            var bad = call
            bad[keyPath: path] = output.raw
            expect(MFA_ERROR_INVALID_ARGUMENT, "output_ptr", bad)
        }
        var bad = call
        bad.logsumexp = query.raw
        expect(MFA_ERROR_INVALID_ARGUMENT, "logsumexp_ptr", bad)
        var legal = call
        legal.value = legal.key
        expect(MFA_SUCCESS, "", legal, "inputs may share memory")
    }

    @Test func doublesAreNotServedByFlatFunctions() {
        var bad = call
        bad.precisions.2 = MFA_PRECISION_FP64
        expect(MFA_ERROR_UNSUPPORTED, "v_precision", bad)
        bad.output = bad.query
        expect(MFA_ERROR_INVALID_ARGUMENT, "output_ptr", bad, "overlap comes first")
    }

    @Test func emptyProblemsWriteNothingAndAreStillChecked() {
        for (batch, rows) in [(0, 2), (1, 0), (0, 0)] as [(UInt32, UInt32)] {
            var empty = call
            empty.batchSize = batch
            empty.seqLenQ = rows
            empty.query = nil
            empty.output = nil
            #expect(empty.forward(context.raw) == MFA_SUCCESS)
            #expect(output.isUntouched && logsumexp.isUntouched)
            empty.precisions.0 = 99
            expect(MFA_ERROR_INVALID_ARGUMENT, "q_precision", empty)
            empty.headDim = 0
            expect(MFA_ERROR_INVALID_DIMENSIONS, "head_dim", empty)
        }
    }

    @Test func withoutColumnsEveryRowIsEmpty() {
        var empty = call
        empty.seqLenKV = 0
        empty.key = nil
        empty.value = nil
        #expect(empty.forward(context.raw) == MFA_SUCCESS)
        #expect(output.values.allSatisfy { $0 == 0 })
        #expect(logsumexp.values.allSatisfy { $0 == -.infinity })
    }

    @Test func messagesArePrivateToAContext() throws {
        let other = try ForeignContext()
        var bad = call
        bad.query = nil
        #expect(bad.forward(context.raw) == MFA_ERROR_INVALID_ARGUMENT)
        #expect(context.lastError == "mfa_attention_forward_quantized: `query_ptr` must not be NULL")
        #expect(other.lastError == "")
        #expect(call.forward(context.raw) == MFA_SUCCESS)
        #expect(context.lastError == "mfa_attention_forward_quantized: `query_ptr` must not be NULL", "kept until the next failure")
    }
}
