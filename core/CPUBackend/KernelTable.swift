// Which kernel serves what: the one place that names kernels. A kernel is in use because it stands here.

import CPUKernels
import MFACore

/// A step of a call that a kernel computes.
enum Step: Int, CaseIterable {
    case forward
    case dValues
    case backward
    case backwardQuery
    case backwardKeyValue
    case backwardBias

    init(_ operation: Operation) {
        switch operation {
        case .forward: self = .forward
        case .backwardQuery: self = .backwardQuery
        case .backwardKeyValue: self = .backwardKeyValue
        }
    }

    /// The step that does the work of this one, and of others, in one pass, where a kernel serves it.
    var joint: Step? { self == .backwardQuery || self == .backwardKeyValue ? .backward : nil }

    var name: StaticString {
        switch self {
        case .forward: "forward"
        case .dValues: "d_values"
        case .backward: "backward"
        case .backwardQuery: "backward for the query"
        case .backwardKeyValue: "backward for key and value"
        case .backwardBias: "backward for mask, sinks and slopes"
        }
    }
}

/// What a kernel was compiled for. Of those that a processor has, the later are the better.
enum InstructionSet: Int, CaseIterable {
    case baseline
    case avx2
    case avxvnni
    case avx512
    case avx512vnni
    case dotprod
    case i8mm

    var name: StaticString {
        switch self {
        case .baseline: "baseline"
        case .avx2: "avx2"
        case .avxvnni: "avxvnni"
        case .avx512: "avx512"
        case .avx512vnni: "avx512vnni"
        case .dotprod: "dotprod"
        case .i8mm: "i8mm"
        }
    }

    /// Whether this processor has it, and all that it includes.
    var isAvailable: Bool {
        switch self {
        case .baseline: true
        case .avx2: cpu_has_avx2()
        case .avxvnni: cpu_has_avxvnni()
        case .avx512: cpu_has_avx2() && cpu_has_avx512()
        case .avx512vnni: cpu_has_avx512vnni()
        case .dotprod: cpu_has_dotprod()
        case .i8mm: cpu_has_i8mm()
        }
    }

    /// The set whose kernels may be used beside its own, with what that one includes.
    private var included: InstructionSet? {
        switch self {
        case .baseline: nil
        case .avx2, .dotprod: .baseline
        case .avxvnni, .avx512: .avx2
        case .avx512vnni: .avx512
        case .i8mm: .dotprod
        }
    }

    /// Whether a processor that has this one runs kernels for `other`.
    func includes(_ other: InstructionSet) -> Bool {
        self == other || included?.includes(other) ?? false
    }
}

/// Kernels of one make.
enum KernelFamily: String, CaseIterable {
    /// Products of INT8 and INT4 operands in integers.
    case integer
    /// FP32, FP16 and BF16 operands, in FP32.
    case float
    /// Plain C for everything.
    case reference
}

/// A line of the table.
struct KernelEntry {
    let step: Step
    let arithmetic: Arithmetic
    let family: KernelFamily
    let instructionSet: InstructionSet
    let kernel: cpu_attention_kernel
}

/// The kernels that one context uses.
struct KernelTable {
    /// For each step and arithmetic, in the order of the whole table.
    private let entries: [[KernelEntry]]
    /// What quantises and dequantises. Its results do not depend on which it is.
    let quantization: cpu_quantization_kernel
    /// The best instruction set among them.
    let instructionSet: InstructionSet

    /// Every kernel there is, the most specific first, the reference kernels last: the first that serves a problem computes it.
    private static func all() -> [KernelEntry] {
        var entries: [KernelEntry] = []

        func add(
            _ family: KernelFamily, _ step: Step, _ arithmetic: Arithmetic, _ instructionSet: InstructionSet, _ kernel: cpu_attention_kernel
        ) {
            entries.append(
                KernelEntry(step: step, arithmetic: arithmetic, family: family, instructionSet: instructionSet, kernel: kernel))
        }
        func reference(_ step: Step, _ arithmetic: Arithmetic, _ instructionSet: InstructionSet, _ kernel: cpu_attention_kernel) {
            add(.reference, step, arithmetic, instructionSet, kernel)
        }

        #if arch(x86_64)
        add(.integer, .forward, .fp32, .avx512vnni, attention_decode_int8_avx512vnni)
        add(.integer, .forward, .fp32, .avx512, attention_decode_int8_avx512)
        add(.integer, .forward, .fp32, .avxvnni, attention_decode_int8_avxvnni)
        add(.integer, .forward, .fp32, .avx2, attention_decode_int8_avx2)
        add(.float, .forward, .fp32, .avx512, attention_decode_float_avx512)
        add(.float, .forward, .fp32, .avx2, attention_decode_float_avx2)
        add(.integer, .forward, .fp32, .avx512vnni, attention_forward_int8_avx512vnni)
        add(.integer, .forward, .fp32, .avxvnni, attention_forward_int8_avxvnni)
        add(.integer, .forward, .fp32, .avx2, attention_forward_int4_avx2)
        add(.integer, .forward, .fp32, .avx2, attention_forward_int8_avx2)
        add(.float, .forward, .fp32, .avx512, attention_forward_float_avx512)
        add(.float, .forward, .fp32, .avx2, attention_forward_float_avx2)
        add(.integer, .dValues, .fp32, .avx512vnni, attention_d_values_int8_avx512vnni)
        add(.integer, .dValues, .fp32, .avx512, attention_d_values_int8_avx512)
        add(.integer, .dValues, .fp32, .avxvnni, attention_d_values_int8_avxvnni)
        add(.integer, .dValues, .fp32, .avx2, attention_d_values_int8_avx2)
        add(.integer, .backward, .fp32, .avx512vnni, attention_backward_int8_avx512vnni)
        add(.integer, .backward, .fp32, .avx512, attention_backward_int8_avx512)
        add(.integer, .backward, .fp32, .avxvnni, attention_backward_int8_avxvnni)
        add(.integer, .backward, .fp32, .avx2, attention_backward_int8_avx2)
        add(.float, .dValues, .fp32, .avx512, attention_d_values_float_avx512)
        add(.float, .dValues, .fp32, .avx2, attention_d_values_float_avx2)
        add(.float, .backward, .fp32, .avx512, attention_backward_float_avx512)
        add(.float, .backward, .fp32, .avx2, attention_backward_float_avx2)
        reference(.forward, .fp32, .avx512, attention_forward_fp32_reference_avx512)
        reference(.dValues, .fp32, .avx512, attention_d_values_fp32_reference_avx512)
        reference(.backwardQuery, .fp32, .avx512, attention_backward_query_fp32_reference_avx512)
        reference(.backwardKeyValue, .fp32, .avx512, attention_backward_key_value_fp32_reference_avx512)
        reference(.backwardBias, .fp32, .avx512, attention_backward_bias_fp32_reference_avx512)
        reference(.forward, .fp64, .avx512, attention_forward_fp64_reference_avx512)
        reference(.dValues, .fp64, .avx512, attention_d_values_fp64_reference_avx512)
        reference(.backwardQuery, .fp64, .avx512, attention_backward_query_fp64_reference_avx512)
        reference(.backwardKeyValue, .fp64, .avx512, attention_backward_key_value_fp64_reference_avx512)
        reference(.backwardBias, .fp64, .avx512, attention_backward_bias_fp64_reference_avx512)
        reference(.forward, .fp32, .avx2, attention_forward_fp32_reference_avx2)
        reference(.dValues, .fp32, .avx2, attention_d_values_fp32_reference_avx2)
        reference(.backwardQuery, .fp32, .avx2, attention_backward_query_fp32_reference_avx2)
        reference(.backwardKeyValue, .fp32, .avx2, attention_backward_key_value_fp32_reference_avx2)
        reference(.backwardBias, .fp32, .avx2, attention_backward_bias_fp32_reference_avx2)
        reference(.forward, .fp64, .avx2, attention_forward_fp64_reference_avx2)
        reference(.dValues, .fp64, .avx2, attention_d_values_fp64_reference_avx2)
        reference(.backwardQuery, .fp64, .avx2, attention_backward_query_fp64_reference_avx2)
        reference(.backwardKeyValue, .fp64, .avx2, attention_backward_key_value_fp64_reference_avx2)
        reference(.backwardBias, .fp64, .avx2, attention_backward_bias_fp64_reference_avx2)
        #elseif arch(arm64)
        add(.float, .forward, .fp32, .baseline, attention_decode_float_neon)
        add(.integer, .forward, .fp32, .i8mm, attention_forward_int8_i8mm)
        add(.integer, .forward, .fp32, .dotprod, attention_forward_int8_dotprod)
        add(.float, .forward, .fp32, .baseline, attention_forward_float_neon)
        add(.float, .dValues, .fp32, .baseline, attention_d_values_float_neon)
        add(.float, .backward, .fp32, .baseline, attention_backward_float_neon)
        #endif
        reference(.forward, .fp32, .baseline, attention_forward_fp32_reference)
        reference(.dValues, .fp32, .baseline, attention_d_values_fp32_reference)
        reference(.backwardQuery, .fp32, .baseline, attention_backward_query_fp32_reference)
        reference(.backwardKeyValue, .fp32, .baseline, attention_backward_key_value_fp32_reference)
        reference(.backwardBias, .fp32, .baseline, attention_backward_bias_fp32_reference)
        reference(.forward, .fp64, .baseline, attention_forward_fp64_reference)
        reference(.dValues, .fp64, .baseline, attention_d_values_fp64_reference)
        reference(.backwardQuery, .fp64, .baseline, attention_backward_query_fp64_reference)
        reference(.backwardKeyValue, .fp64, .baseline, attention_backward_key_value_fp64_reference)
        reference(.backwardBias, .fp64, .baseline, attention_backward_bias_fp64_reference)
        return entries
    }

    /// What MFA_KERNELS can say.
    private static var words: String {
        (KernelFamily.allCases.map(\.rawValue) + InstructionSet.allCases.map { "\($0.name)" }).joined(separator: ", ")
    }

    /// The quantisation kernel for an instruction set.
    private static func quantization(_ instructionSet: InstructionSet) -> cpu_quantization_kernel {
        #if arch(x86_64)
        switch instructionSet {
        case .avx512, .avx512vnni: return quantization_reference_avx512
        case .avx2, .avxvnni: return quantization_reference_avx2
        default: break
        }
        #endif
        return quantization_reference
    }

    /// The kernels that this processor runs and that `forced` allows: nil for all, or words separated by commas. Families limit what may
    /// serve before the reference kernels, an instruction set limits all kernels to those that need no more than it.
    init(forced: String?) throws(MFAError) {
        var limit: InstructionSet?
        var families: [KernelFamily] = []
        for word in (forced ?? "").split(separator: ",") {
            if let named = InstructionSet.allCases.first(where: { "\($0.name)" == word }) {
                if !named.isAvailable {
                    throw MFAError(.deviceUnavailable, "MFA_KERNELS asks for \"\(word)\", which this processor does not have")
                }
                limit = named
            } else if let named = KernelFamily(rawValue: String(word)) {
                families.append(named)
            } else {
                throw MFAError(.deviceUnavailable, "MFA_KERNELS takes \(KernelTable.words), separated by commas (got \"\(word)\")")
            }
        }
        var entries = [[KernelEntry]](repeating: [], count: Step.allCases.count * 2)
        var best = InstructionSet.baseline
        for entry in KernelTable.all() where limit?.includes(entry.instructionSet) ?? entry.instructionSet.isAvailable {
            if !families.isEmpty && entry.family != .reference && !families.contains(entry.family) { continue }
            entries[KernelTable.index(entry.step, entry.arithmetic)].append(entry)
            if entry.instructionSet.rawValue > best.rawValue { best = entry.instructionSet }
        }
        self.entries = entries
        instructionSet = best
        quantization = KernelTable.quantization(instructionSet)
    }

    /// The kernel for a step of a problem, as kernels see it: one for its joint step, if there is one.
    func kernel(
        _ step: Step, _ arithmetic: Arithmetic, for attention: UnsafePointer<cpu_attention>
    ) throws(MFAError) -> cpu_attention_kernel {
        if let joint = step.joint, let kernel = find(joint, arithmetic, for: attention) { return kernel }
        if let kernel = find(step, arithmetic, for: attention) { return kernel }
        throw .unsupported("no kernel on this device serves \(step.name) of this problem")
    }

    /// The same, or nil. Joint steps have kernels for some problems only.
    func find(_ step: Step, _ arithmetic: Arithmetic, for attention: UnsafePointer<cpu_attention>) -> cpu_attention_kernel? {
        entries[KernelTable.index(step, arithmetic)].first { $0.kernel.serves?(attention) ?? true }?.kernel
    }

    private static func index(_ step: Step, _ arithmetic: Arithmetic) -> Int { step.rawValue * 2 + (arithmetic == .fp64 ? 1 : 0) }
}
