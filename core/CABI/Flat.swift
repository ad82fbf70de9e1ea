// The flat functions: each fills a request and takes the general path.

import CMFA
import MFA

@c @implementation
public func mfa_attention_forward(
    _ context: UnsafeMutableRawPointer?,
    _ query: UnsafeMutableRawPointer?, _ key: UnsafeMutableRawPointer?, _ value: UnsafeMutableRawPointer?,
    _ output: UnsafeMutableRawPointer?,
    _ batchSize: UInt32, _ seqLenQ: UInt32, _ seqLenKV: UInt32, _ numHeads: UInt32, _ headDim: UInt16,
    _ softmaxScale: Float, _ causal: Bool,
    _ queryPrecision: Int32, _ keyPrecision: Int32, _ valuePrecision: Int32,
    _ transposeQuery: Bool, _ transposeKey: Bool, _ transposeValue: Bool, _ transposeOutput: Bool
) -> Int32 {
    withContext(UInt(bitPattern: context), "mfa_attention_forward") { (entry, session) throws(MFAError) in
        var deferred = DeferredFailures()
        let record = TrainingRecord(
            call: FlatCall(batchSize: batchSize, seqLenQ: seqLenQ, seqLenKV: seqLenKV, numHeads: numHeads, headDim: headDim),
            query: FlatOperand("q", queryPrecision, transposed: transposeQuery, &deferred),
            key: FlatOperand("k", keyPrecision, transposed: transposeKey, &deferred),
            value: FlatOperand("v", valuePrecision, transposed: transposeValue, &deferred),
            softmaxScale: softmaxScale, causal: causal)
        try forward(entry, session, record, query, key, value, output, nil, transposeOutput: transposeOutput, deferred)
    }
}

@c @implementation
public func mfa_attention_forward_quantized(
    _ context: UnsafeMutableRawPointer?,
    _ query: UnsafeMutableRawPointer?, _ key: UnsafeMutableRawPointer?, _ value: UnsafeMutableRawPointer?,
    _ output: UnsafeMutableRawPointer?, _ logsumexp: UnsafeMutableRawPointer?,
    _ batchSize: UInt32, _ seqLenQ: UInt32, _ seqLenKV: UInt32, _ numHeads: UInt32, _ headDim: UInt16,
    _ softmaxScale: Float, _ causal: Bool,
    _ queryPrecision: Int32, _ keyPrecision: Int32, _ valuePrecision: Int32,
    _ queryScale: Float, _ queryZeroPoint: Int32,
    _ keyScale: Float, _ keyZeroPoint: Int32,
    _ valueScale: Float, _ valueZeroPoint: Int32,
    _ transposeQuery: Bool, _ transposeKey: Bool, _ transposeValue: Bool, _ transposeOutput: Bool
) -> Int32 {
    withContext(UInt(bitPattern: context), "mfa_attention_forward_quantized") { (entry, session) throws(MFAError) in
        var deferred = DeferredFailures()
        let record = TrainingRecord(
            call: FlatCall(batchSize: batchSize, seqLenQ: seqLenQ, seqLenKV: seqLenKV, numHeads: numHeads, headDim: headDim),
            query: FlatOperand(
                "q", queryPrecision, scale: queryScale, zeroPoint: queryZeroPoint, transposed: transposeQuery, &deferred),
            key: FlatOperand(
                "k", keyPrecision, scale: keyScale, zeroPoint: keyZeroPoint, transposed: transposeKey, &deferred),
            value: FlatOperand(
                "v", valuePrecision, scale: valueScale, zeroPoint: valueZeroPoint, transposed: transposeValue, &deferred),
            softmaxScale: softmaxScale, causal: causal)
        try forward(entry, session, record, query, key, value, output, logsumexp, transposeOutput: transposeOutput, deferred)
    }
}

@c @implementation
public func mfa_attention_backward_query_quantized(
    _ context: UnsafeMutableRawPointer?,
    _ query: UnsafeMutableRawPointer?, _ key: UnsafeMutableRawPointer?, _ value: UnsafeMutableRawPointer?,
    _ gradOutput: UnsafeMutableRawPointer?, _ logsumexp: UnsafeMutableRawPointer?,
    _ gradQuery: UnsafeMutableRawPointer?, _ dValues: UnsafeMutableRawPointer?,
    _ batchSize: UInt32, _ seqLenQ: UInt32, _ seqLenKV: UInt32, _ numHeads: UInt32, _ headDim: UInt16,
    _ queryScale: Float, _ queryZeroPoint: Int32
) -> Int32 {
    withContext(UInt(bitPattern: context), "mfa_attention_backward_query_quantized") { (entry, session) throws(MFAError) in
        let call = FlatCall(batchSize: batchSize, seqLenQ: seqLenQ, seqLenKV: seqLenKV, numHeads: numHeads, headDim: headDim)
        var gradients = GradientRequest()
        gradients.gradOutput = call.tensor(gradOutput, .fp32, tokens: seqLenQ)
        gradients.gradQuery = call.tensor(gradQuery, .fp32, tokens: seqLenQ)
        gradients.dValues = dValues
        try backward(entry, session, call, query, key, value, logsumexp, gradients) { (record) throws(MFAError) in
            try record.query.check(scale: queryScale, zeroPoint: queryZeroPoint, "q")
        }
    }
}

@c @implementation
public func mfa_attention_backward_kv_quantized(
    _ context: UnsafeMutableRawPointer?,
    _ query: UnsafeMutableRawPointer?, _ key: UnsafeMutableRawPointer?, _ value: UnsafeMutableRawPointer?,
    _ gradOutput: UnsafeMutableRawPointer?, _ logsumexp: UnsafeMutableRawPointer?, _ dValues: UnsafeMutableRawPointer?,
    _ gradKey: UnsafeMutableRawPointer?, _ gradValue: UnsafeMutableRawPointer?,
    _ batchSize: UInt32, _ seqLenQ: UInt32, _ seqLenKV: UInt32, _ numHeads: UInt32, _ headDim: UInt16,
    _ queryScale: Float, _ queryZeroPoint: Int32,
    _ keyScale: Float, _ keyZeroPoint: Int32,
    _ valueScale: Float, _ valueZeroPoint: Int32
) -> Int32 {
    withContext(UInt(bitPattern: context), "mfa_attention_backward_kv_quantized") { (entry, session) throws(MFAError) in
        let call = FlatCall(batchSize: batchSize, seqLenQ: seqLenQ, seqLenKV: seqLenKV, numHeads: numHeads, headDim: headDim)
        var gradients = GradientRequest()
        gradients.gradOutput = call.tensor(gradOutput, .fp32, tokens: seqLenQ)
        gradients.gradKey = call.tensor(gradKey, .fp32, tokens: seqLenKV)
        gradients.gradValue = call.tensor(gradValue, .fp32, tokens: seqLenKV)
        gradients.dValues = dValues
        gradients.dValuesGiven = true
        try backward(entry, session, call, query, key, value, logsumexp, gradients) { (record) throws(MFAError) in
            try record.query.check(scale: queryScale, zeroPoint: queryZeroPoint, "q")
            try record.key.check(scale: keyScale, zeroPoint: keyZeroPoint, "k")
            try record.value.check(scale: valueScale, zeroPoint: valueZeroPoint, "v")
        }
    }
}

/// The request of a flat call, without results.
private func request(
    _ entry: ContextEntry, _ call: FlatCall, _ operands: (query: FlatOperand, key: FlatOperand, value: FlatOperand),
    _ query: UnsafeMutableRawPointer?, _ key: UnsafeMutableRawPointer?, _ value: UnsafeMutableRawPointer?,
    _ logsumexp: UnsafeMutableRawPointer?
) -> AttentionRequest {
    AttentionRequest(
        query: operands.query.tensor(query, call, tokens: call.seqLenQ, entry, 0),
        key: operands.key.tensor(key, call, tokens: call.seqLenKV, entry, 1),
        value: operands.value.tensor(value, call, tokens: call.seqLenKV, entry, 2), output: nil, logsumexp: logsumexp)
}

/// Runs a flat forward call. `record` says how its operands are read; with a logsumexp it is kept for backward.
private func forward(
    _ entry: ContextEntry, _ session: Session, _ record: TrainingRecord,
    _ query: UnsafeMutableRawPointer?, _ key: UnsafeMutableRawPointer?, _ value: UnsafeMutableRawPointer?,
    _ output: UnsafeMutableRawPointer?, _ logsumexp: UnsafeMutableRawPointer?, transposeOutput: Bool, _ deferred: DeferredFailures
) throws(MFAError) {
    var request = request(entry, record.call, (record.query, record.key, record.value), query, key, value, logsumexp)
    let outputPrecision = record.query.precision.isFloat ? record.query.precision : .fp32
    request.output = record.call.tensor(output, outputPrecision, tokens: record.call.seqLenQ, transposed: transposeOutput)
    request.options.softmaxScale = Double(record.softmaxScale)
    request.options.causal = record.causal
    request.deferred = deferred
    do throws(MFAError) {
        try session.forward(request)
    } catch {
        if error.status == .executionFailed { entry.records.remove(UInt(bitPattern: logsumexp)) }
        throw inFlatWords(error)
    }
    if let logsumexp { entry.records.insert(record, at: UInt(bitPattern: logsumexp)) }
}

/// Runs a flat backward call as the forward call with the same logsumexp read its operands. `check` compares what both were told.
private func backward(
    _ entry: ContextEntry, _ session: Session, _ call: FlatCall,
    _ query: UnsafeMutableRawPointer?, _ key: UnsafeMutableRawPointer?, _ value: UnsafeMutableRawPointer?,
    _ logsumexp: UnsafeMutableRawPointer?, _ gradientRequest: GradientRequest, _ check: (TrainingRecord) throws(MFAError) -> Void
) throws(MFAError) {
    do throws(MFAError) {
        var gradients = gradientRequest
        if gradients.dValues == nil && !call.isEmpty { gradients.deferred.notePointer("`d_values` must not be NULL") }
        // Sizes and pointers come before the record. They can be checked without it: operands are taken to be of bytes, and no flat tensor's
        // count of elements depends on its layout.
        let unknown = (FlatOperand.unknown, FlatOperand.unknown, FlatOperand.unknown)
        var attention = request(entry, call, unknown, query, key, value, logsumexp)
        try attention.checkSizes()
        try gradients.checkSizes(of: attention)
        try attention.checkPointers(for: .backward)
        try gradients.checkPointers(of: attention)
        if !call.isEmpty {
            guard let record = entry.records[UInt(bitPattern: logsumexp)], record.call == call else {
                throw .dimensions("no forward call with this `logsumexp` and these sizes left a training record in this context")
            }
            try check(record)
            attention = request(entry, call, (record.query, record.key, record.value), query, key, value, logsumexp)
            attention.options.softmaxScale = Double(record.softmaxScale)
            attention.options.causal = record.causal
        }
        try session.backward(attention, gradients)
    } catch {
        throw inFlatWords(error)
    }
}
