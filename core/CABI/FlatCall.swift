import MFACore

/// The sizes of a flat call.
struct FlatCall: Equatable {
    let batchSize: UInt32
    let seqLenQ: UInt32
    let seqLenKV: UInt32
    let numHeads: UInt32
    let headDim: UInt16

    /// Whether there is no query row.
    var isEmpty: Bool { batchSize == 0 || seqLenQ == 0 }

    func shape(tokens: UInt32) -> Shape { Shape(Int(batchSize), Int(numHeads), Int(tokens), Int(headDim)) }

    /// A tensor in the layout of the flat functions.
    func tensor(_ data: UnsafeMutableRawPointer?, _ precision: Precision, tokens: UInt32, transposed: Bool = false) -> Tensor {
        Tensor(data, precision: precision, shape: shape(tokens: tokens), layout: transposed ? .bhds : .bshd)
    }
}

/// How an operand of a flat call lies in memory and what its codes stand for.
struct FlatOperand {
    let precision: Precision
    let scale: Float
    let zeroPoint: Int32
    let transposed: Bool

    /// The operand `name`: q, k or v. Notes what is wrong with its code or scale. FP64 is legal but not served.
    init(
        _ name: StaticString, _ code: Int32, scale: Float = 1, zeroPoint: Int32 = 0, transposed: Bool, _ deferred: inout DeferredFailures
    ) {
        var precision = Precision.fp32
        if let known = Precision(rawValue: code) {
            precision = known
        } else {
            deferred.noteCode("`\(name)_precision` must be one of MFA_PRECISION_* (got \(code))")
        }
        if precision == .bool {
            deferred.noteCode("`\(name)_precision` must be of a float type, INT8 or INT4 (got bool)")
        }
        if precision == .fp64 {
            deferred.noteUnsupported("`\(name)_precision`: FP64 is served by mfa_attention_run_forward only")
            precision = .fp32
        }
        if precision.isQuantized && !(scale > 0 && scale < .infinity) {
            deferred.noteCode("`\(name)_scale` must be finite and positive (got \(scale))")
        }
        self.precision = precision
        self.scale = scale
        self.zeroPoint = zeroPoint
        self.transposed = transposed
    }

    /// An operand of which nothing but its place is known.
    static let unknown = FlatOperand(precision: .int8, scale: 1, zeroPoint: 0, transposed: false)

    private init(precision: Precision, scale: Float, zeroPoint: Int32, transposed: Bool) {
        self.precision = precision
        self.scale = scale
        self.zeroPoint = zeroPoint
        self.transposed = transposed
    }

    /// The operand at an address. Its scale and zero point are kept at `index` of the entry's arrays.
    func tensor(
        _ data: UnsafeMutableRawPointer?, _ call: FlatCall, tokens: UInt32, _ entry: ContextEntry, _ index: Int
    ) -> Tensor {
        var tensor = call.tensor(data, precision, tokens: tokens, transposed: transposed)
        if precision.isQuantized && (scale != 1 || zeroPoint != 0) {
            entry.scales[index] = scale
            entry.zeroPoints[index] = zeroPoint
            tensor.quantization = Quantization(
                scales: entry.scales + index, zeroPoints: zeroPoint == 0 ? nil : entry.zeroPoints + index)
        }
        return tensor
    }

    /// Throws unless a backward call's scale and zero point are those of the forward call.
    func check(scale: Float, zeroPoint: Int32, _ name: StaticString) throws(MFAError) {
        guard precision.isQuantized else { return }
        if scale.bitPattern != self.scale.bitPattern {
            throw .argument("`\(name)_scale` must be that of the forward call, \(self.scale) (got \(scale))")
        }
        if zeroPoint != self.zeroPoint {
            throw .argument("`\(name)_zero_point` must be that of the forward call, \(self.zeroPoint) (got \(zeroPoint))")
        }
    }
}

/// The message of a failure in the words of a flat function, whose pointers are called `query_ptr` and so on.
func inFlatWords(_ error: MFAError) -> MFAError {
    let pointers: Set<Substring> = [
        "query", "key", "value", "output", "logsumexp", "grad_output", "grad_query", "grad_key", "grad_value", "d_values",
    ]
    let parts = error.message.split(separator: "`", omittingEmptySubsequences: false)
    let renamed = parts.map { pointers.contains($0) ? "\($0)_ptr" : String($0) }
    return MFAError(error.status, renamed.joined(separator: "`"))
}
