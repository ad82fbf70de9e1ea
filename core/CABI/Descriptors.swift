// From the descriptors of mfa.h to requests. Nothing is refused here: what is wrong is noted, for validation to report it in its turn.

import CMFA
import MFACore

/// The most bytes that a descriptor is believed to have. One that claims more is not looked at beyond what the library knows.
private let longestDescriptor = 4096

/// Copies a descriptor of any version; nil if it is absent or too short to be read, which is noted.
func read<Descriptor>(
    _ pointer: UnsafePointer<Descriptor>?, _ empty: Descriptor, _ name: StaticString, _ deferred: inout DeferredFailures
) -> Descriptor? {
    guard let pointer else { return nil }
    // All descriptors are still those of the first version.
    let known = MemoryLayout<Descriptor>.size
    let bytes = UnsafeRawPointer(pointer)
    let given = Int(bytes.loadUnaligned(as: UInt32.self))
    if given < known {
        deferred.notePointer("`\(name)`: `struct_size` must be \(known) or more (got \(given))")
        return nil
    }
    var descriptor = empty
    withUnsafeMutableBytes(of: &descriptor) { $0.copyMemory(from: UnsafeRawBufferPointer(start: bytes, count: known)) }
    if given > longestDescriptor
        || UnsafeRawBufferPointer(rebasing: UnsafeRawBufferPointer(start: bytes, count: given)[known...]).contains(where: { $0 != 0 })
    {
        deferred.noteUnsupported("`\(name)`: it has fields that this version of the library does not know")
    }
    return descriptor
}

/// A flag, 0 or 1.
func flag(_ value: Int32, _ name: StaticString, _ deferred: inout DeferredFailures) -> Bool {
    if value != 0 && value != 1 { deferred.noteCode("`\(name)` must be 0 or 1 (got \(value))") }
    return value != 0
}

/// A field that must be 0.
func reserved(_ value: Int64, _ name: StaticString, _ deferred: inout DeferredFailures) {
    if value != 0 { deferred.noteCode("`\(name)`: `reserved` must be 0 (got \(value))") }
}

func precision(_ code: Int32, _ name: StaticString, _ deferred: inout DeferredFailures) -> Precision {
    if let precision = Precision(rawValue: code) { return precision }
    deferred.noteCode("`\(name)` must be one of MFA_PRECISION_* (got \(code))")
    return .fp32
}

func granularity(_ code: Int32, _ name: StaticString, _ deferred: inout DeferredFailures) -> Granularity {
    if let granularity = Granularity(rawValue: code) { return granularity }
    deferred.noteCode("`\(name)`: `granularity` must be one of MFA_GRANULARITY_* (got \(code))")
    return .tensor
}

/// A tensor's descriptor; nil if it is NULL or cannot be read.
func tensor(_ pointer: UnsafePointer<mfa_tensor_t>?, _ name: StaticString, _ deferred: inout DeferredFailures) -> Tensor? {
    guard let descriptor = read(pointer, mfa_tensor_t(), name, &deferred) else { return nil }
    let shape = descriptor.shape
    let strides = descriptor.strides
    var tensor = Tensor(
        descriptor.data, precision: precision(descriptor.precision, name, &deferred),
        shape: Shape(Int(shape.0), Int(shape.1), Int(shape.2), Int(shape.3)),
        strides: Strides(Int(strides.0), Int(strides.1), Int(strides.2), Int(strides.3)))
    if let token = descriptor.buffer {
        if let buffer = handles.find(UInt(bitPattern: token), .buffer) {
            tensor.buffer = unsafeDowncast(buffer, to: Buffer.self)
            tensor.bufferOffset = Int(clamping: descriptor.buffer_offset)
        } else {
            deferred.notePointer("`\(name)`: `buffer` is destroyed or is not a buffer")
        }
    }
    if tensor.precision.isQuantized { tensor.quantization = quantization(descriptor.quantization, name, &deferred) }
    return tensor
}

private func quantization(
    _ pointer: UnsafePointer<mfa_quantization_t>?, _ name: StaticString, _ deferred: inout DeferredFailures
) -> Quantization? {
    guard let descriptor = read(pointer, mfa_quantization_t(), name, &deferred) else { return nil }
    reserved(Int64(descriptor.reserved), name, &deferred)
    return Quantization(
        granularity: granularity(descriptor.granularity, name, &deferred), blockSize: Int(descriptor.block_size),
        groupSize: Int(descriptor.group_size), rotated: flag(descriptor.rotated, "rotated", &deferred), scales: descriptor.scales,
        zeroPoints: descriptor.zero_points, channelMeans: descriptor.channel_means)
}

private func scheme(
    _ pointer: UnsafePointer<mfa_quantization_scheme_t>?, _ name: StaticString, _ deferred: inout DeferredFailures
) -> QuantizationScheme? {
    guard let descriptor = read(pointer, mfa_quantization_scheme_t(), name, &deferred) else { return nil }
    return QuantizationScheme(
        precision: precision(descriptor.precision, name, &deferred), granularity: granularity(descriptor.granularity, name, &deferred),
        blockSize: Int(descriptor.block_size), groupSize: Int(descriptor.group_size),
        asymmetric: flag(descriptor.asymmetric, "asymmetric", &deferred), smooth: flag(descriptor.smooth, "smooth", &deferred),
        rotate: flag(descriptor.rotate, "rotate", &deferred))
}

/// A whole problem; throws if there is none to be checked.
func request(_ pointer: UnsafePointer<mfa_attention_t>?) throws(MFAError) -> AttentionRequest {
    guard let pointer else { throw .argument("`attention` must not be NULL") }
    var deferred = DeferredFailures()
    guard let descriptor = read(pointer, mfa_attention_t(), "attention", &deferred) else {
        throw .argument("`attention`: `struct_size` must be \(MemoryLayout<mfa_attention_t>.size) or more")
    }
    reserved(Int64(descriptor.reserved), "attention", &deferred)
    var options = AttentionOptions()
    options.softmaxScale = descriptor.softmax_scale
    options.mask = tensor(descriptor.mask, "mask", &deferred)
    options.causal = flag(descriptor.causal, "causal", &deferred)
    if let alignment = Alignment(rawValue: descriptor.alignment) {
        options.alignment = alignment
    } else {
        deferred.noteCode("`alignment` must be one of MFA_ALIGNMENT_* (got \(descriptor.alignment))")
    }
    options.queryOffsets = descriptor.query_offsets
    options.numQueryOffsets = Int(descriptor.num_query_offsets)
    options.softcap = descriptor.softcap
    options.windowLeft = descriptor.window_left
    options.windowRight = descriptor.window_right
    options.kvLengths = descriptor.kv_lengths
    options.alibiSlopes = descriptor.alibi_slopes
    options.sinks = descriptor.sinks
    options.dropoutP = descriptor.dropout_p
    options.seed = descriptor.seed
    options.dropoutOffset = descriptor.dropout_offset
    options.quantizeQuery = scheme(descriptor.quantize_query, "quantize_query", &deferred)
    options.quantizeKey = scheme(descriptor.quantize_key, "quantize_key", &deferred)
    options.quantizeValue = scheme(descriptor.quantize_value, "quantize_value", &deferred)
    var request = AttentionRequest(
        query: tensor(descriptor.query, "query", &deferred), key: tensor(descriptor.key, "key", &deferred),
        value: tensor(descriptor.value, "value", &deferred), output: tensor(descriptor.output, "output", &deferred),
        logsumexp: descriptor.logsumexp, options: options)
    request.deferred = deferred
    return request
}

/// The gradients that are asked for; throws if there is no descriptor to be checked.
func gradients(_ pointer: UnsafePointer<mfa_attention_gradients_t>?) throws(MFAError) -> GradientRequest {
    guard let pointer else { throw .argument("`gradients` must not be NULL") }
    var request = GradientRequest()
    guard let descriptor = read(pointer, mfa_attention_gradients_t(), "gradients", &request.deferred) else {
        throw .argument("`gradients`: `struct_size` must be \(MemoryLayout<mfa_attention_gradients_t>.size) or more")
    }
    request.dValuesGiven = flag(descriptor.d_values_given, "d_values_given", &request.deferred)
    request.gradOutput = tensor(descriptor.grad_output, "grad_output", &request.deferred)
    request.gradLogsumexp = descriptor.grad_logsumexp
    request.dValues = descriptor.d_values
    request.gradQuery = tensor(descriptor.grad_query, "grad_query", &request.deferred)
    request.gradKey = tensor(descriptor.grad_key, "grad_key", &request.deferred)
    request.gradValue = tensor(descriptor.grad_value, "grad_value", &request.deferred)
    request.gradMask = tensor(descriptor.grad_mask, "grad_mask", &request.deferred)
    request.gradSinks = descriptor.grad_sinks
    request.gradAlibiSlopes = descriptor.grad_alibi_slopes
    return request
}
