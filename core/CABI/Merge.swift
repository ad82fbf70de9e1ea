import CMFA
import MFA

@c @implementation
public func mfa_attention_merge(
    _ context: OpaquePointer?,
    _ outputA: UnsafePointer<mfa_tensor_t>?, _ logsumexpA: UnsafeRawPointer?,
    _ outputB: UnsafePointer<mfa_tensor_t>?, _ logsumexpB: UnsafeRawPointer?,
    _ output: UnsafePointer<mfa_tensor_t>?, _ logsumexp: UnsafeMutableRawPointer?,
    _ statisticsPrecision: Int32
) -> Int32 {
    withContext(UInt(bitPattern: context), "mfa_attention_merge") { (_, session) throws(MFAError) in
        var deferred = DeferredFailures()
        let a = PartialResult(
            output: tensor(outputA, "output_a", &deferred), logsumexp: UnsafeMutableRawPointer(mutating: logsumexpA))
        let b = PartialResult(
            output: tensor(outputB, "output_b", &deferred), logsumexp: UnsafeMutableRawPointer(mutating: logsumexpB))
        let merged = PartialResult(output: tensor(output, "output", &deferred), logsumexp: logsumexp)
        try session.merge(a, b, into: merged, statistics: Precision(rawValue: statisticsPrecision), deferred)
    }
}
