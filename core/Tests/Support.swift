// What several suites need: flat calls with their arguments named, memory that shows whether it was written, contexts that go away.

import CMFA
import Testing

#if canImport(Glibc)
import Glibc
#else
import Darwin
#endif

/// A context of the C interface for the length of a test.
final class ForeignContext {
    let handle: OpaquePointer

    init(threads: UInt32 = 1, allocator: CountingAllocator? = nil) throws {
        var options = mfa_context_options_t()
        options.struct_size = UInt32(MemoryLayout<mfa_context_options_t>.size)
        options.num_threads = threads
        if let allocator {
            options.allocator_state = Unmanaged.passUnretained(allocator).toOpaque()
            options.allocate = { state, size, alignment in
                guard let state else { return nil }
                return Unmanaged<CountingAllocator>.fromOpaque(state).takeUnretainedValue().allocate(size, alignment)
            }
            options.deallocate = { state, memory, size, alignment in
                guard let state else { return }
                Unmanaged<CountingAllocator>.fromOpaque(state).takeUnretainedValue().deallocate(memory, size, alignment)
            }
        }
        var handle: OpaquePointer?
        try #require(mfa_create_context_with_options(&options, &handle) == MFA_SUCCESS)
        self.handle = try #require(handle)
    }

    deinit {
        _ = mfa_destroy_context(raw)
    }

    /// As the flat functions take it.
    var raw: UnsafeMutableRawPointer { UnsafeMutableRawPointer(handle) }

    var lastError: String { mfa_last_error(handle).map { String(cString: $0) } ?? "" }
}

/// Counts what is had and given back, and can run out.
final class CountingAllocator {
    private(set) var allocations = 0
    private(set) var held = 0
    private(set) var most = 0
    /// Of the allocation, counted from 0, that fails.
    var failing: Int?

    func allocate(_ size: Int, _ alignment: Int) -> UnsafeMutableRawPointer? {
        defer { allocations += 1 }
        if allocations == failing { return nil }
        held += size
        most = max(most, held)
        return UnsafeMutableRawPointer.allocate(byteCount: size, alignment: alignment)
    }

    func deallocate(_ memory: UnsafeMutableRawPointer?, _ size: Int, _ alignment: Int) {
        held -= size
        memory?.deallocate()
    }
}

/// Numbers that a test can compare with what they were.
final class Numbers {
    let count: Int
    let pointer: UnsafeMutablePointer<Float>

    /// Filled with a value that no result has.
    static let untouched: Float = -12345.5

    init(_ count: Int, _ value: (Int) -> Float = { _ in Numbers.untouched }) {
        self.count = count
        pointer = .allocate(capacity: max(count, 1))
        for index in 0..<count { (pointer + index).initialize(to: value(index)) }
    }

    deinit {
        pointer.deallocate()
    }

    /// Numbers between -1 and 1 that look random.
    static func random(_ count: Int, seed: UInt64) -> Numbers {
        var generator = SmallGenerator(state: seed)
        return Numbers(count) { _ in Float.random(in: -1...1, using: &generator) }
    }

    var raw: UnsafeMutableRawPointer { UnsafeMutableRawPointer(pointer) }
    var values: [Float] { Array(UnsafeBufferPointer(start: pointer, count: count)) }
    var isUntouched: Bool { values.allSatisfy { $0 == Numbers.untouched } }
}

/// The same numbers in every run.
struct SmallGenerator: RandomNumberGenerator {
    var state: UInt64

    mutating func next() -> UInt64 {
        state = state &* 6_364_136_223_846_793_005 &+ 1_442_695_040_888_963_407
        var mixed = state
        mixed = (mixed ^ mixed >> 33) &* 0xff51_afd7_ed55_8ccd
        return mixed ^ mixed >> 33
    }
}

/// A flat call, with legal arguments to begin with: batch 1, 2 rows, 3 columns, 1 head of 4 channels.
struct FlatArguments {
    var query: UnsafeMutableRawPointer?
    var key: UnsafeMutableRawPointer?
    var value: UnsafeMutableRawPointer?
    var output: UnsafeMutableRawPointer?
    var logsumexp: UnsafeMutableRawPointer?
    var batchSize: UInt32 = 1
    var seqLenQ: UInt32 = 2
    var seqLenKV: UInt32 = 3
    var numHeads: UInt32 = 1
    var headDim: UInt16 = 4
    var softmaxScale: Float = 0.5
    var causal = false
    var precisions: (Int32, Int32, Int32) = (MFA_PRECISION_FP32, MFA_PRECISION_FP32, MFA_PRECISION_FP32)
    var scales: (Float, Float, Float) = (1, 1, 1)
    var zeroPoints: (Int32, Int32, Int32) = (0, 0, 0)
    var transposes = (false, false, false, false)

    func forward(_ context: UnsafeMutableRawPointer?) -> Int32 {
        mfa_attention_forward_quantized(
            context, query, key, value, output, logsumexp, batchSize, seqLenQ, seqLenKV, numHeads, headDim, softmaxScale, causal,
            precisions.0, precisions.1, precisions.2, scales.0, zeroPoints.0, scales.1, zeroPoints.1, scales.2, zeroPoints.2,
            transposes.0, transposes.1, transposes.2, transposes.3)
    }

    func backwardQuery(
        _ context: UnsafeMutableRawPointer?, gradOutput: UnsafeMutableRawPointer?, gradQuery: UnsafeMutableRawPointer?,
        dValues: UnsafeMutableRawPointer?
    ) -> Int32 {
        mfa_attention_backward_query_quantized(
            context, query, key, value, gradOutput, logsumexp, gradQuery, dValues, batchSize, seqLenQ, seqLenKV, numHeads, headDim,
            scales.0, zeroPoints.0)
    }

    func backwardKeyValue(
        _ context: UnsafeMutableRawPointer?, gradOutput: UnsafeMutableRawPointer?, dValues: UnsafeMutableRawPointer?,
        gradKey: UnsafeMutableRawPointer?, gradValue: UnsafeMutableRawPointer?
    ) -> Int32 {
        mfa_attention_backward_kv_quantized(
            context, query, key, value, gradOutput, logsumexp, dValues, gradKey, gradValue, batchSize, seqLenQ, seqLenKV, numHeads,
            headDim, scales.0, zeroPoints.0, scales.1, zeroPoints.1, scales.2, zeroPoints.2)
    }
}

/// Attention of contiguous [batch, tokens, heads, channels] tensors, as the formulas say.
func naiveAttention(
    _ query: [Float], _ key: [Float], _ value: [Float], batch: Int, heads: Int, kvHeads: Int, rows: Int, columns: Int, channels: Int,
    scale: Double, causal: Bool = false
) -> (output: [Double], logsumexp: [Double]) {
    var output = [Double](repeating: 0, count: batch * rows * heads * channels)
    var logsumexp = [Double](repeating: -.infinity, count: batch * heads * rows)
    for b in 0..<batch {
        for h in 0..<heads {
            let g = h / (heads / kvHeads)
            for i in 0..<rows {
                let queryRow = ((b * rows + i) * heads + h) * channels
                var weights: [Double] = []
                for j in 0..<columns where !causal || j <= i {
                    let keyRow = ((b * columns + j) * kvHeads + g) * channels
                    weights.append(exp(scale * (0..<channels).reduce(0) { $0 + Double(query[queryRow + $1]) * Double(key[keyRow + $1]) }))
                }
                let sum = weights.reduce(0, +)
                guard sum > 0 else { continue }
                logsumexp[(b * heads + h) * rows + i] = log(sum)
                for (j, weight) in weights.enumerated() {
                    let valueRow = ((b * columns + j) * kvHeads + g) * channels
                    for d in 0..<channels { output[queryRow + d] += weight / sum * Double(value[valueRow + d]) }
                }
            }
        }
    }
    return (output, logsumexp)
}

/// The largest difference of two lists.
func distance(_ first: [Float], _ second: [Double]) -> Double {
    zip(first, second).reduce(first.count == second.count ? 0 : .infinity) { max($0, abs(Double($1.0) - $1.1)) }
}
