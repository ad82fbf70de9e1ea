// The inputs of calls that quantise must be finite (status 5). The backend finds that out while it quantises, so that every value is read once;
// what comes later in the order of the statuses must not be reported before. Whoever is about to report it asks here first.

extension AttentionProblem {
    /// Reports what is known not to be served, after the inputs.
    func checkServed(_ deferred: DeferredFailures, reading access: ArrayAccess) throws(MFAError) {
        guard let unsupported = deferred.unsupported else { return }
        if access == .all { try checkFusedInputs() }
        throw unsupported
    }

    /// Checks the operands that are quantised on the way in.
    public func checkFusedInputs() throws(MFAError) {
        if options.quantizeQuery != nil { try query.checkFinite("query") }
        if options.quantizeKey != nil { try key.checkFinite("key", lengths: options.kvLengths) }
        if options.quantizeValue != nil { try value.checkFinite("value", lengths: options.kvLengths) }
    }
}

extension Tensor {
    /// Checks that all elements of a float type are finite as FP32: those of the first `lengths[b]` tokens, where there are lengths.
    public func checkFinite(_ name: StaticString, lengths: UnsafePointer<Int64>? = nil) throws(MFAError) {
        guard hasElements, let address else { return }
        for batch in 0..<shape[0] {
            let tokens = lengths.map { Int($0[batch]) } ?? shape[2]
            for head in 0..<shape[1] {
                for token in 0..<tokens {
                    let row = batch * strides[0] + head * strides[1] + token * strides[2]
                    for channel in 0..<shape[3] where !isFinite(address, row + channel * strides[3]) {
                        throw .notFinite(name)
                    }
                }
            }
        }
    }

    private func isFinite(_ address: UnsafeRawPointer, _ index: Int) -> Bool {
        let element = address + index * precision.unitSize
        switch precision {
        case .fp32: return element.load(as: Float.self).isFinite
        case .fp64: return Float(element.load(as: Double.self)).isFinite
        case .fp16: return element.load(as: UInt16.self) & 0x7C00 != 0x7C00
        case .bf16: return element.load(as: UInt16.self) & 0x7F80 != 0x7F80
        case .int4, .int8, .bool: return true
        }
    }
}

extension MFAError {
    /// An operand that is to be quantised has a value that cannot be.
    public static func notFinite(_ name: StaticString) -> MFAError {
        .argument("`\(name)`: values to be quantised must be finite, as FP32 and after rotation and smoothing")
    }
}
