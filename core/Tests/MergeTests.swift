import CABI
import CMFA
import MFA
import Testing

#if canImport(Glibc)
import Glibc
#else
import Darwin
#endif

/// Two parts of a tiny problem: 2 heads, 3 rows, 2 channels.
@Suite struct MergeTests {
    static let shape = Shape(1, 2, 3, 2)
    let outputA = Numbers(12) { Float($0) }
    let outputB = Numbers(12) { Float(100 - $0) }
    let logsumexpA = Numbers(6) { [0, 1, 2, -.infinity, -.infinity, 3][$0] }
    let logsumexpB = Numbers(6) { [0, -1, 700, 5, -.infinity, -.infinity][$0] }
    let output = Numbers(12)
    let logsumexp = Numbers(6)

    private func part(_ output: Numbers, _ logsumexp: Numbers) -> PartialResult {
        PartialResult(output: Tensor(output.raw, precision: .fp32, shape: MergeTests.shape), logsumexp: logsumexp.raw)
    }

    @Test func weighsPartsByTheirLogsumexp() throws {
        // Row 3 has part b only, row 5 part a only: what the absent one holds means nothing.
        for at in 6..<8 { outputA.pointer[at] = .nan }
        for at in 10..<12 { outputB.pointer[at] = .infinity }
        let context = try Context(device: .cpu, threads: 2)
        try context.merge(part(outputA, logsumexpA), part(outputB, logsumexpB), into: part(output, logsumexp))
        for row in 0..<6 {
            let (a, b) = (Double(logsumexpA.pointer[row]), Double(logsumexpB.pointer[row]))
            let (hasA, hasB) = (a > -.infinity, b > -.infinity)
            let weight = hasA && hasB ? 1 / (1 + exp(b - a)) : hasA ? 1 : 0
            for at in 2 * row..<2 * row + 2 {
                let partA = hasA ? weight * Double(outputA.pointer[at]) : 0
                let partB = hasB ? (1 - weight) * Double(outputB.pointer[at]) : 0
                #expect(abs(Double(output.pointer[at]) - (partA + partB)) < 1e-5)
            }
        }
        #expect(logsumexp.values[2...4] == [700, 5, -.infinity])
        #expect(output.values[8...9] == [0, 0])
    }

    @Test func refusesAnOutputThatIsAnInput() throws {
        let context = try Context(device: .cpu, threads: 1)
        let before = outputA.values
        let error = #expect(throws: MFAError.self) {
            try context.merge(part(outputA, logsumexpA), part(outputB, logsumexpB), into: part(outputA, logsumexp))
        }
        #expect(error?.status == .invalidArgument)
        #expect(outputA.values == before && logsumexp.isUntouched)
    }

    @Test func refusesNullAndUnknownCodes() throws {
        let context = try ForeignContext()
        #expect(mfa_attention_merge(context.handle, nil, nil, nil, nil, nil, nil, 0) == MFA_ERROR_INVALID_ARGUMENT)
        #expect(mfa_attention_merge(nil, nil, nil, nil, nil, nil, nil, 0) == MFA_ERROR_INVALID_CONTEXT)
    }

    @Test func refusesStatisticsOfAnotherPrecision() throws {
        let context = try Context(device: .cpu, threads: 1)
        #expect(throws: MFAError.self) {
            try context.merge(
                part(outputA, logsumexpA), part(outputB, logsumexpB), into: part(output, logsumexp), statistics: .fp16)
        }
        #expect(output.isUntouched && logsumexp.isUntouched)
    }
}
