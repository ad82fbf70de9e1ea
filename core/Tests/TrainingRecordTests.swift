import CMFA
import Testing

/// What flat forward calls leave for the backward calls.
@Suite struct TrainingRecordTests {
    let context: ForeignContext
    let query = Numbers.random(8, seed: 1)
    let key = Numbers.random(12, seed: 2)
    let value = Numbers.random(12, seed: 3)
    let gradOutput = Numbers.random(8, seed: 4)
    let output = Numbers(8)
    let logsumexp = Numbers(2)
    let gradQuery = Numbers(8)
    let gradKey = Numbers(12)
    let gradValue = Numbers(12)
    let dValues = Numbers(2)
    var call = FlatArguments()

    init() throws {
        context = try ForeignContext()
        call.query = query.raw
        call.key = key.raw
        call.value = value.raw
        call.output = output.raw
        call.logsumexp = logsumexp.raw
    }

    func backwardQuery(_ call: FlatArguments) -> Int32 {
        call.backwardQuery(context.raw, gradOutput: gradOutput.raw, gradQuery: gradQuery.raw, dValues: dValues.raw)
    }

    func backwardKeyValue(_ call: FlatArguments) -> Int32 {
        call.backwardKeyValue(
            context.raw, gradOutput: gradOutput.raw, dValues: dValues.raw, gradKey: gradKey.raw, gradValue: gradValue.raw)
    }

    @Test func gradientsFollowForward() {
        #expect(call.forward(context.raw) == MFA_SUCCESS)
        #expect(backwardQuery(call) == MFA_SUCCESS)
        #expect(backwardKeyValue(call) == MFA_SUCCESS)
        // d = rowsum(dO * O), and the columns' gradients of V sum to those of the output, since weights sum to 1.
        for row in 0..<2 {
            let expected = (0..<4).reduce(Float(0)) { $0 + gradOutput.values[row * 4 + $1] * output.values[row * 4 + $1] }
            #expect(abs(dValues.values[row] - expected) < 1e-5)
        }
        for channel in 0..<4 {
            let sum = (0..<3).reduce(Float(0)) { $0 + gradValue.values[$1 * 4 + channel] }
            #expect(abs(sum - gradOutput.values[channel] - gradOutput.values[4 + channel]) < 1e-5)
        }
        // A finite difference of sum(dO * O) in one element of Q and one of K.
        for (numbers, gradient) in [(query, gradQuery), (key, gradKey)] {
            func loss(_ change: Float) -> Double {
                let kept = numbers.pointer[5]
                numbers.pointer[5] = kept + change
                defer { numbers.pointer[5] = kept }
                #expect(call.forward(context.raw) == MFA_SUCCESS)
                return zip(output.values, gradOutput.values).reduce(0) { $0 + Double($1.0) * Double($1.1) }
            }
            #expect(abs((loss(0.01) - loss(-0.01)) / 0.02 - Double(gradient.values[5])) < 1e-3)
        }
    }

    @Test func withoutARecordBackwardIsRefused() {
        #expect(backwardQuery(call) == MFA_ERROR_INVALID_DIMENSIONS)
        #expect(backwardKeyValue(call) == MFA_ERROR_INVALID_DIMENSIONS)
        #expect(context.lastError.contains("`logsumexp_ptr`"))
        #expect(gradQuery.isUntouched && gradKey.isUntouched && gradValue.isUntouched && dValues.isUntouched)
    }

    @Test func inferenceLeavesNoRecord() {
        var inference = call
        inference.logsumexp = nil
        #expect(inference.forward(context.raw) == MFA_SUCCESS)
        #expect(backwardQuery(call) == MFA_ERROR_INVALID_DIMENSIONS)
    }

    @Test func aFailedForwardLeavesTheRecordAlone() {
        #expect(call.forward(context.raw) == MFA_SUCCESS)
        var bad = call
        bad.softmaxScale = .nan
        #expect(bad.forward(context.raw) == MFA_ERROR_INVALID_ARGUMENT)
        #expect(backwardQuery(call) == MFA_SUCCESS)
    }

    @Test func dimensionsMustMatch() {
        #expect(call.forward(context.raw) == MFA_SUCCESS)
        for change in [\FlatArguments.seqLenQ, \.seqLenKV] {
            var other = call
            other[keyPath: change] -= 1
            #expect(backwardQuery(other) == MFA_ERROR_INVALID_DIMENSIONS)
        }
        var other = call
        other.headDim = 2
        other.numHeads = 2
        #expect(backwardQuery(other) == MFA_ERROR_INVALID_DIMENSIONS)
        #expect(gradQuery.isUntouched)
    }

    @Test func pointersComeBeforeTheRecordAndScalesAfter() {
        var bad = call
        bad.key = nil
        #expect(backwardQuery(bad) == MFA_ERROR_INVALID_ARGUMENT, "pointers (5) before the record (3)")
        bad = call
        bad.headDim = 0
        bad.key = nil
        #expect(backwardQuery(bad) == MFA_ERROR_INVALID_DIMENSIONS, "sizes (3) before pointers (5)")
        bad = call
        bad.scales.0 = .nan
        #expect(backwardQuery(bad) == MFA_ERROR_INVALID_DIMENSIONS, "the record (3) before scales (5)")
        #expect(
            call.backwardQuery(context.raw, gradOutput: gradOutput.raw, gradQuery: gradQuery.raw, dValues: nil)
                == MFA_ERROR_INVALID_ARGUMENT)
        #expect(context.lastError.contains("`d_values_ptr`"))
    }

    @Test func scalesOfQuantisedOperandsMustBeForwards() {
        let codes = Numbers(12) { Float($0) }
        var quantised = call
        quantised.key = codes.raw
        quantised.precisions.1 = MFA_PRECISION_INT8
        quantised.scales = (.nan, 0.125, .nan)
        quantised.zeroPoints = (9, 3, 9)
        #expect(quantised.forward(context.raw) == MFA_SUCCESS)
        quantised.scales.0 = 77
        quantised.zeroPoints.2 = -5
        #expect(backwardQuery(quantised) == MFA_SUCCESS, "those of float operands are ignored")
        #expect(backwardKeyValue(quantised) == MFA_SUCCESS)
        quantised.scales.1 = 0.25
        #expect(backwardKeyValue(quantised) == MFA_ERROR_INVALID_ARGUMENT)
        #expect(context.lastError.contains("`k_scale`"))
        quantised.scales.1 = 0.125
        quantised.zeroPoints.1 = 4
        #expect(backwardKeyValue(quantised) == MFA_ERROR_INVALID_ARGUMENT)
        #expect(context.lastError.contains("`k_zero_point`"))
    }

    @Test func emptyProblemsNeedNoRecordAndWriteZeros() {
        var empty = call
        empty.seqLenQ = 0
        empty.query = nil
        empty.logsumexp = nil
        #expect(empty.backwardQuery(context.raw, gradOutput: nil, gradQuery: nil, dValues: nil) == MFA_SUCCESS)
        #expect(
            empty.backwardKeyValue(context.raw, gradOutput: nil, dValues: nil, gradKey: gradKey.raw, gradValue: gradValue.raw)
                == MFA_SUCCESS)
        #expect(gradKey.values.allSatisfy { $0 == 0 } && gradValue.values.allSatisfy { $0 == 0 })
    }

    @Test func theOldestOf4096IsDropped() {
        let many = Numbers(2 * 4097)
        func address(_ index: Int) -> UnsafeMutableRawPointer { many.raw + index * 8 }
        var each = call
        for index in 0..<4096 {
            each.logsumexp = address(index)
            #expect(each.forward(context.raw) == MFA_SUCCESS)
        }
        // The first is made the newest, so that the second is the oldest now.
        each.logsumexp = address(0)
        #expect(each.forward(context.raw) == MFA_SUCCESS)
        each.logsumexp = address(4096)
        #expect(each.forward(context.raw) == MFA_SUCCESS)
        for (index, status) in [(0, MFA_SUCCESS), (1, MFA_ERROR_INVALID_DIMENSIONS), (2, MFA_SUCCESS), (4096, MFA_SUCCESS)] {
            each.logsumexp = address(index)
            #expect(backwardQuery(each) == status, "record \(index)")
        }
    }

    @Test func oneAddressManyTimesIsOneRecord() {
        for _ in 0..<20_000 { #expect(call.forward(context.raw) == MFA_SUCCESS) }
        #expect(backwardQuery(call) == MFA_SUCCESS)
    }
}
