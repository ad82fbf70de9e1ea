import MFA

/// Runs conformance cases through the Swift interface: cases on standard input, one line each, to results on standard output.
///
///     conformance DEVICE THREADS
///
/// What a case says and what a result says is in docs/conformance.md. What Swift's types do not let one say is skipped. The flat functions
/// are for callers of C; what computes the same in their layouts stands for them.
@main enum Conformance {
    static func main() throws {
        let arguments = CommandLine.arguments
        let devices: [String: Device] = ["cpu": .cpu, "metal": .metal, "softmetal": .softmetal]
        guard arguments.count == 3, let device = devices[arguments[1]], let threads = Int(arguments[2]) else {
            fatalError("usage: conformance DEVICE THREADS")
        }
        let context = try Context(device: device, threads: threads)
        while let line = readLine() {
            let run = Run(Case(line), context)
            var result = "\"id\": \"\(run.of.text("id"))\", "
            do {
                let failure = try run.perform()
                let outputs = run.outputs.map { "\"\($0)\": \"\($1)\"" }.joined(separator: ", ")
                // Messages have nothing that JSON escapes.
                let (status, message) = (failure?.status.rawValue ?? 0, failure?.message ?? "")
                result += "\"outputs\": {\(outputs)}, \"status\": \(status), \"message\": \"\(message)\""
            } catch {
                result += "\"skipped\": \"\(error.reason)\""
            }
            print("{\(result)}")
        }
    }
}

/// Why a case cannot be said here.
struct Inexpressible: Error {
    let reason: String
}

/// One line of JSON without nesting, in which no text contains a quotation mark.
struct Case {
    private var fields: [Substring: Substring] = [:]

    init(_ line: String) {
        var rest = Substring(line)
        func take(until isEnd: (Character) -> Bool) -> Substring {
            let taken = rest.prefix { !isEnd($0) }
            rest = rest[taken.endIndex...].dropFirst()
            return taken
        }
        while rest.contains("\"") {
            _ = take { $0 == "\"" }
            let name = take { $0 == "\"" }
            rest = rest.dropFirst(2)
            switch rest.first {
            case "\"":
                rest = rest.dropFirst()
                fields[name] = take { $0 == "\"" }
            case "[":
                rest = rest.dropFirst()
                fields[name] = take { $0 == "]" }
            default:
                fields[name] = take { $0 == "," || $0 == "}" }
            }
        }
    }

    func has(_ name: String) -> Bool { fields[name[...]] != nil }
    func text(_ name: String) -> String { fields[name[...]].map(String.init) ?? "" }
    func integer(_ name: String, _ otherwise: Int = 0) -> Int { Int(text(name)) ?? otherwise }
    func real(_ name: String, _ otherwise: Double = 0) -> Double { Double(text(name)) ?? otherwise }
    func isTrue(_ name: String) -> Bool { text(name) == "true" }
    func list(_ name: String) -> [Int64] { text(name).split(separator: ", ").compactMap { Int64($0) } }
    func names(_ name: String) -> [Substring] { text(name).split(separator: ",") }
}

/// What a number belongs to; of operands, plus the operand's own: 0, 1, 2.
enum Stream {
    static let gradOutput: UInt64 = 3
    static let gradLogsumexp: UInt64 = 4
    static let mask: UInt64 = 5
    static let sinks: UInt64 = 6
    static let alibiSlopes: UInt64 = 7
    static let scales: UInt64 = 16
    static let zeroPoints: UInt64 = 32
    static let channelMeans: UInt64 = 48
}

/// The words that inputs are made from, and their numbers.
struct Word {
    let bits: UInt64

    init(_ seed: UInt64, _ stream: UInt64, _ index: Int) {
        var z = (UInt64(index) &+ 1) &* 0x9E37_79B9_7F4A_7C15 &+ (seed &* 256 &+ stream) &* 0xBF58_476D_1CE4_E5B9
        z = (z ^ (z >> 30)) &* 0xBF58_476D_1CE4_E5B9
        z = (z ^ (z >> 27)) &* 0x94D0_49BB_1331_11EB
        bits = z ^ (z >> 31)
    }

    private var sum: Int { Int(bits & 0xFFFF) + Int(bits >> 16 & 0xFFFF) + Int(bits >> 32 & 0xFFFF) + Int(bits >> 48) }
    var real: Float { Float(sum - 131_070) / 32_768 }
    private var shortReal: Float { Float((sum >> 10) - 128) / 32 }
    var slope: Float { Float(1 + (bits >> 61)) / 16 }
    var zeroPoint: Int32 { Int32(bits >> 61) - 4 }
    func scale(_ precision: Precision) -> Float { Float(8 + (bits >> 61)) / (precision == .int8 ? 256 : 32) }

    /// The bytes of the number in a type; of INT4, the low nibble.
    func pattern(_ precision: Precision) -> UInt64 {
        switch precision {
        case .fp64: return Double(real).bitPattern
        case .fp32: return UInt64(real.bitPattern)
        case .bf16: return UInt64(shortReal.bitPattern >> 16)
        case .fp16:
            let single = shortReal.bitPattern
            let magnitude = single & 0x7FFF_FFFF
            return UInt64(single >> 16 & 0x8000 | (magnitude == 0 ? 0 : (magnitude - 112 << 23) >> 13))
        case .int8: return (bits >> 56) ^ 0x80
        case .int4: return (bits >> 60) ^ 8
        case .bool: return bits >> 62 != 0 ? 1 : 0
        }
    }
}

let mostElements = 1 << 22

/// A product of sizes; nil for more than there is memory for, which is to be refused.
func count(_ sizes: [Int]) -> Int? {
    if sizes.contains(0) { return 0 }
    var product = 1
    for size in sizes {
        let (next, overflow) = product.multipliedReportingOverflow(by: size)
        if overflow || next > mostElements { return nil }
        product = next
    }
    return product
}

/// A case on its way through the library.
final class Run {
    let of: Case
    private(set) var outputs: [(String, String)] = []
    private let context: Context
    private let seed: UInt64
    private var memory: [UnsafeMutableRawPointer] = []

    init(_ of: Case, _ context: Context) {
        self.of = of
        self.context = context
        seed = UInt64(of.integer("input_seed"))
    }

    deinit { for block in memory { block.deallocate() } }

    /// Performs the case; returns why the library refused it.
    func perform() throws(Inexpressible) -> MFAError? {
        for field in ["query_precision_code", "value_precision_code"] where of.has(field) {
            throw Inexpressible(reason: "\(field): a precision is none but those that there are")
        }
        switch of.text("operation") {
        case "forward": return try attention(backward: false)
        case "backward": return try attention(backward: true)
        case "quantize": return try quantize()
        case "dequantize": return try dequantize()
        case "merge": return try merge()
        default: return try flat()
        }
    }

    private func failure(_ body: () throws(MFAError) -> Void) -> MFAError? {
        do {
            try body()
            return nil
        } catch {
            return error
        }
    }

    // MARK: Memory

    /// Memory until the case's end, filled with 0xA5. What nothing reads or writes gets a little.
    private func take(_ bytes: Int?) -> UnsafeMutableRawPointer {
        let size = bytes ?? 64
        let block = UnsafeMutableRawPointer.allocate(byteCount: max(size, 1), alignment: 64)
        block.initializeMemory(as: UInt8.self, repeating: 0xA5, count: size)
        memory.append(block)
        return block
    }

    private func array<Number>(_ numbers: [Number]) -> UnsafeMutablePointer<Number> {
        let block = take(numbers.count * MemoryLayout<Number>.stride).bindMemory(to: Number.self, capacity: numbers.count)
        block.initialize(from: numbers, count: numbers.count)
        return block
    }

    private func precision(_ name: String) throws(Inexpressible) -> Precision {
        let precisions: [String: Precision] = [
            "float32": .fp32, "float16": .fp16, "bfloat16": .bf16, "float64": .fp64, "int8": .int8, "int4": .int4, "bool": .bool,
        ]
        guard let precision = precisions[name] else { throw Inexpressible(reason: "there is no type \(name)") }
        return precision
    }

    private func size(_ precision: Precision, _ shape: Shape) -> Int? {
        let row = precision == .int4 ? shape[3] / 2 + shape[3] % 2 : shape[3]
        return count([shape[0], shape[1], shape[2], row]).map { $0 * precision.unitSize }
    }

    private func write(_ pattern: UInt64, _ memory: UnsafeMutableRawPointer, _ precision: Precision, at index: Int) {
        let address = memory + index * precision.unitSize
        switch precision.unitSize {
        case 8: address.storeBytes(of: pattern, as: UInt64.self)
        case 4: address.storeBytes(of: UInt32(truncatingIfNeeded: pattern), as: UInt32.self)
        case 2: address.storeBytes(of: UInt16(truncatingIfNeeded: pattern), as: UInt16.self)
        default: address.storeBytes(of: UInt8(truncatingIfNeeded: pattern), as: UInt8.self)
        }
    }

    /// A contiguous tensor, filled from `stream`; nil: for results.
    private func tensor(_ name: String, _ shape: Shape, _ stream: UInt64?, layout: Layout? = nil) throws(Inexpressible) -> Tensor {
        let type = try precision(name)
        let bytes = size(type, shape)
        let block = take(bytes)
        let made = Tensor(block, precision: type, shape: shape, layout: layout ?? (of.text("layout") == "bshd" ? .bshd : .bhsd))
        guard let stream, bytes != nil, let elements = count([shape[0], shape[1], shape[2], shape[3]]) else { return made }
        for n in 0..<elements {
            let d = n % shape[3]
            let row = n / shape[3]
            let (s, h, b) = (row % shape[2], row / shape[2] % shape[1], row / shape[2] / shape[1])
            let start = b * made.strides[0] + h * made.strides[1] + s * made.strides[2]
            let word = Word(seed, stream, n).pattern(type)
            if type == .int4 {
                let pair = block + (start / 2 + d / 2 * made.strides[3])
                let low = d % 2 == 0 ? 0 : pair.load(as: UInt8.self)
                pair.storeBytes(of: low | UInt8(word) << (d % 2 * 4), as: UInt8.self)
            } else {
                write(word, block, type, at: start + d * made.strides[3])
            }
        }
        return made
    }

    private func granularity(_ name: String) throws(Inexpressible) -> Granularity {
        let names = ["tensor", "head", "token", "block", "channel", "group"]
        guard let index = names.firstIndex(of: of.text("\(name)_granularity")), let found = Granularity(rawValue: Int32(index)) else {
            throw Inexpressible(reason: "there is no such granularity")
        }
        return found
    }

    /// What codes stand for; without an operand's number, to be written. Also how many scales there are.
    private func quantization(_ name: String, _ tensor: Tensor, _ number: UInt64?) throws(Inexpressible) -> (Quantization, scales: Int) {
        let shape = tensor.shape
        let blockSize = of.integer("\(name)_block_size", 1)
        let groupSize = of.integer("\(name)_group_size", 1)
        let granularity = try granularity(name)
        guard let scales = ScaleLayout(granularity, shape: shape, blockSize: blockSize, groupSize: groupSize)?.count else {
            throw Inexpressible(reason: "there are too many scales")
        }
        let means = shape[0] * shape[1] * shape[3]
        func numbers<Number>(_ count: Int, _ before: Number, _ stream: UInt64, _ number: UInt64?, _ value: (Word) -> Number) -> [Number] {
            (0..<count).map { n in number.map { value(Word(seed, stream + $0, n)) } ?? before }
        }
        let quantization = Quantization(
            granularity: granularity, blockSize: blockSize, groupSize: groupSize, rotated: of.isTrue("\(name)_rotated"),
            scales: array(numbers(scales, 0, Stream.scales, number) { $0.scale(tensor.precision) }),
            zeroPoints: of.isTrue("\(name)_zero_points") ? array(numbers(scales, 0, Stream.zeroPoints, number) { $0.zeroPoint }) : nil,
            channelMeans: of.isTrue("\(name)_channel_means") ? array(numbers(means, 0, Stream.channelMeans, number) { $0.real }) : nil)
        return (quantization, scales)
    }

    private func operand(_ name: String, _ shape: Shape, _ number: UInt64) throws(Inexpressible) -> Tensor {
        var made = try tensor(of.text(name), shape, number)
        if of.has("\(name)_granularity") { made.quantization = try quantization(name, made, number).0 }
        return made
    }

    /// Numbers a row or a head, from `stream`; nil: for results.
    private func statistics(_ count: Int?, _ precision: Precision, _ stream: UInt64?) -> UnsafeMutableRawPointer {
        let block = take(count.map { $0 * precision.unitSize })
        guard let count, let stream else { return block }
        for n in 0..<count {
            let word = Word(seed, stream, n)
            let number = stream == Stream.alibiSlopes ? word.slope : word.real
            write(precision == .fp64 ? Double(number).bitPattern : UInt64(number.bitPattern), block, precision, at: n)
        }
        return block
    }

    private func report(_ name: String, _ memory: UnsafeRawPointer?, _ bytes: Int?) {
        guard let memory, let bytes else { return }
        var hash: UInt64 = 0xCBF2_9CE4_8422_2325
        for byte in UnsafeRawBufferPointer(start: memory, count: bytes) { hash = hash &* 0x100_0000_01B3 &+ UInt64(byte) }
        let digits = String(hash, radix: 16)
        outputs.append((name, String(repeating: "0", count: 16 - digits.count) + digits))
    }

    private func report(_ name: String, _ tensor: Tensor?) {
        if let tensor { report(name, tensor.data, size(tensor.precision, tensor.shape)) }
    }

    // MARK: Operations

    private var shapes: (query: Shape, key: Shape, value: Shape, output: Shape) {
        let batch = of.integer("batch_size", 1)
        let heads = of.integer("num_heads", 1)
        let kvHeads = of.integer("num_kv_heads", heads)
        let (rows, columns) = (of.integer("seq_len_q", 1), of.integer("seq_len_kv", 1))
        let channels = of.integer("head_dim", 1)
        let channelsV = of.integer("head_dim_v", channels)
        return (
            Shape(batch, heads, rows, channels), Shape(batch, kvHeads, columns, channels), Shape(batch, kvHeads, columns, channelsV),
            Shape(batch, heads, rows, channelsV)
        )
    }

    private func scheme(_ name: String) throws(Inexpressible) -> QuantizationScheme? {
        let field = "quantize_\(name)"
        guard of.has(field) else { return nil }
        return QuantizationScheme(
            precision: try precision(of.text(field)), granularity: try granularity(field), blockSize: of.integer("\(field)_block_size"),
            groupSize: of.integer("\(field)_group_size"), asymmetric: of.isTrue("\(field)_asymmetric"),
            smooth: of.isTrue("\(field)_smooth"), rotate: of.isTrue("\(field)_rotate"))
    }

    private func mask() throws(Inexpressible) -> Tensor {
        let sizes = of.list("mask_shape").map(Int.init)
        let shape = Shape(sizes[0], sizes[1], sizes[2], sizes[3])
        let made = try tensor(of.text("mask"), shape, Stream.mask, layout: .bhsd)
        let infinities: [Precision: UInt64] = [
            .fp16: 0xFC00, .bf16: 0xFF80, .fp32: UInt64((-Float.infinity).bitPattern), .fp64: (-Double.infinity).bitPattern,
        ]
        guard let infinity = infinities[made.precision], let block = made.data else { return made }
        for n in 0..<(count(sizes) ?? 0) where Word(seed, Stream.mask, n).bits >> 61 == 0 {
            write(infinity, block, made.precision, at: n)
        }
        return made
    }

    private func options(_ heads: Int, _ statistic: Precision) throws(Inexpressible) -> AttentionOptions {
        guard let alignment = Alignment(rawValue: Int32(of.integer("alignment"))) else {
            throw Inexpressible(reason: "there is no such alignment")
        }
        var options = AttentionOptions()
        options.softmaxScale = of.real("softmax_scale", 1)
        options.softcap = of.real("softcap")
        options.causal = of.isTrue("causal")
        options.alignment = alignment
        options.windowLeft = Int64(of.integer("window_left", -1))
        options.windowRight = Int64(of.integer("window_right", -1))
        if of.has("mask") { options.mask = try mask() }
        if of.has("kv_lengths") { options.kvLengths = UnsafePointer(array(of.list("kv_lengths"))) }
        if of.has("query_offsets") {
            options.queryOffsets = UnsafePointer(array(of.list("query_offsets")))
            options.numQueryOffsets = of.list("query_offsets").count
        }
        let perHead = count([heads])
        if of.isTrue("alibi_slopes") { options.alibiSlopes = UnsafeRawPointer(statistics(perHead, statistic, Stream.alibiSlopes)) }
        if of.isTrue("sinks") { options.sinks = UnsafeRawPointer(statistics(perHead, statistic, Stream.sinks)) }
        options.dropoutP = of.real("dropout_p")
        options.seed = UInt64(of.text("seed")) ?? 0
        options.dropoutOffset = UInt32(of.integer("dropout_offset"))
        options.quantizeQuery = try scheme("query")
        options.quantizeKey = try scheme("key")
        options.quantizeValue = try scheme("value")
        return options
    }

    private func attention(backward: Bool) throws(Inexpressible) -> MFAError? {
        let (shapes, nulls, wanted) = (shapes, of.names("null"), of.names("gradients"))
        let query = try operand("query", shapes.query, 0)
        var key = try operand("key", shapes.key, 1)
        let value = try operand("value", shapes.value, 2)
        let output = try tensor(of.text("output"), shapes.output, nil)
        if nulls.contains("key_data") { key.data = nil }
        let isDouble = [query, key, value].contains { $0.precision == .fp64 }
        let statistic = isDouble ? Precision.fp64 : .fp32
        let heads = shapes.query[1]
        let rows = count([shapes.query[0], heads, shapes.query[2]])
        let logsumexp = statistics(rows, statistic, nil)
        let options = try options(heads, statistic)
        let attention = QuantizedAttention(context: context)
        var failed = failure { () throws(MFAError) in
            if nulls.isEmpty || nulls == ["key_data"] {
                try attention.forward(query: query, key: key, value: value, output: output, logsumexp: logsumexp, options: options)
            } else {
                try context.forward(
                    AttentionRequest(
                        query: nulls.contains("query") ? nil : query, key: key, value: value,
                        output: nulls.contains("output") ? nil : output, logsumexp: logsumexp, options: options))
            }
        }
        if !backward {
            report("output", output)
            report("logsumexp", logsumexp, rows.map { $0 * statistic.unitSize })
            return failed
        }
        func gradient(_ name: String, _ shape: Shape) throws(Inexpressible) -> Tensor? {
            wanted.contains(name[...]) ? try tensor(of.text("gradient"), shape, nil) : nil
        }
        var gradients = GradientRequest()
        gradients.gradOutput = try tensor(of.text("output"), shapes.output, Stream.gradOutput)
        if of.isTrue("grad_logsumexp") { gradients.gradLogsumexp = UnsafeRawPointer(statistics(rows, statistic, Stream.gradLogsumexp)) }
        gradients.gradQuery = try gradient("query", shapes.query)
        gradients.gradKey = try gradient("key", shapes.key)
        gradients.gradValue = try gradient("value", shapes.value)
        if wanted.contains("mask"), let mask = options.mask {
            gradients.gradMask = try tensor(of.text("mask"), mask.shape, nil, layout: .bhsd)
        }
        if wanted.contains("sinks") { gradients.gradSinks = statistics(heads, statistic, nil) }
        if wanted.contains("alibi_slopes") { gradients.gradAlibiSlopes = statistics(heads, statistic, nil) }
        if failed == nil {
            failed = failure { () throws(MFAError) in
                try attention.backward(
                    query: query, key: key, value: value, output: of.isTrue("without_output") ? nil : output, logsumexp: logsumexp,
                    gradients: gradients, options: options)
            }
        }
        report("query", gradients.gradQuery)
        report("key", gradients.gradKey)
        report("value", gradients.gradValue)
        report("mask", gradients.gradMask)
        report("sinks", gradients.gradSinks, heads * statistic.unitSize)
        report("alibi_slopes", gradients.gradAlibiSlopes, heads * statistic.unitSize)
        return failed
    }

    private func quantize() throws(Inexpressible) -> MFAError? {
        let shape = shapes.query
        let input = try tensor(of.text("query"), shape, 0)
        var codes = try tensor(of.text("codes"), shape, nil)
        let (quantization, scales) = try quantization("codes", codes, nil)
        codes.quantization = quantization
        let failed = failure { () throws(MFAError) in try context.quantize(input, into: codes) }
        report("codes", codes)
        report("scales", quantization.scales, scales * MemoryLayout<Float>.size)
        report("zero_points", quantization.zeroPoints, scales * MemoryLayout<Int32>.size)
        report("channel_means", quantization.channelMeans, shape[0] * shape[1] * shape[3] * MemoryLayout<Float>.size)
        return failed
    }

    private func dequantize() throws(Inexpressible) -> MFAError? {
        let codes = try operand("codes", shapes.query, 0)
        let output = try tensor(of.text("output"), shapes.query, nil)
        let failed = failure { () throws(MFAError) in try context.dequantize(codes, into: output) }
        report("output", output)
        return failed
    }

    private func merge() throws(Inexpressible) -> MFAError? {
        let shape = shapes.query
        let rows = count([shape[0], shape[1], shape[2]])
        let a = PartialResult(output: try tensor(of.text("query"), shape, 0), logsumexp: statistics(rows, .fp32, Stream.gradLogsumexp))
        let b = PartialResult(output: try tensor(of.text("key"), shape, 1), logsumexp: statistics(rows, .fp32, Stream.mask))
        let merged = PartialResult(output: try tensor(of.text("output"), shape, nil), logsumexp: statistics(rows, .fp32, nil))
        let failed = failure { () throws(MFAError) in try context.merge(a, b, into: merged) }
        report("output", merged.output)
        report("logsumexp", merged.logsumexp, rows.map { $0 * MemoryLayout<Float>.size })
        return failed
    }

    /// What a flat function computes, with tensors in its layouts. What it refuses, it refuses in its own words.
    private func flat() throws(Inexpressible) -> MFAError? {
        if of.integer("status") != 0 { throw Inexpressible(reason: "the flat functions are for callers of C") }
        let shapes = shapes
        func operand(_ name: String, _ letter: String, _ shape: Shape, _ number: UInt64) throws(Inexpressible) -> Tensor {
            var made = try tensor(of.text(name), shape, number, layout: of.isTrue("transpose_\(letter)") ? .bhds : .bshd)
            if of.has("\(letter)_scale"), made.precision.isQuantized {
                let zero = Int32(of.integer("\(letter)_zero_point"))
                made.quantization = Quantization(
                    scales: array([Float(of.real("\(letter)_scale"))]), zeroPoints: zero == 0 ? nil : array([zero]))
            }
            return made
        }
        let query = try operand("query", "q", shapes.query, 0)
        let key = try operand("key", "k", shapes.key, 1)
        let value = try operand("value", "v", shapes.value, 2)
        let output = try tensor(of.text("output"), shapes.output, nil, layout: of.isTrue("transpose_o") ? .bhds : .bshd)
        let rows = count([shapes.query[0], shapes.query[1], shapes.query[2]])
        let (logsumexp, dValues) = (statistics(rows, .fp32, nil), statistics(rows, .fp32, nil))
        let bytes = rows.map { $0 * MemoryLayout<Float>.size }
        var options = AttentionOptions()
        options.softmaxScale = Double(Float(of.real("softmax_scale", 1)))
        options.causal = of.isTrue("causal")
        let attention = QuantizedAttention(context: context)
        var failed = failure { () throws(MFAError) in
            try attention.forward(query: query, key: key, value: value, output: output, logsumexp: logsumexp, options: options)
        }
        if of.text("operation") == "flat_forward" {
            report("output", output)
            if of.has("q_scale") { report("logsumexp", logsumexp, bytes) }
            return failed
        }
        let gradOutput = try tensor("float32", shapes.output, Stream.gradOutput, layout: .bshd)
        let gradQuery = try tensor("float32", shapes.query, nil, layout: .bshd)
        let gradKey = try tensor("float32", shapes.key, nil, layout: .bshd)
        let gradValue = try tensor("float32", shapes.value, nil, layout: .bshd)
        if failed == nil {
            failed = failure { () throws(MFAError) in
                try attention.backwardQuery(
                    query: query, key: key, value: value, logsumexp: logsumexp, gradOutput: gradOutput, gradQuery: gradQuery,
                    dValues: dValues, options: options)
                try attention.backwardKeyValue(
                    query: query, key: key, value: value, logsumexp: logsumexp, gradOutput: gradOutput, dValues: dValues,
                    gradKey: gradKey, gradValue: gradValue, options: options)
            }
        }
        report("query", gradQuery)
        report("key", gradKey)
        report("value", gradValue)
        report("d_values", dValues, bytes)
        return failed
    }
}
