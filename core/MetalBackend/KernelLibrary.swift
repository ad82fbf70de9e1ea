import MFACore
import Metal

/// A file of kernels.
enum KernelSource {
    case attentionForward
    case attentionBackward
    case attentionDecode
    case attentionSequences
    case quantize

    var text: String {
        switch self {
        case .attentionForward: KernelSources.attentionForward
        case .attentionBackward: KernelSources.attentionBackward
        case .attentionDecode: KernelSources.attentionDecode
        case .attentionSequences: KernelSources.attentionSequences
        case .quantize: KernelSources.quantize
        }
    }
}

/// Values of function constants by index: what a pipeline is specialised to.
struct KernelConstants: Hashable {
    private var integers: [Int: Int32] = [:]
    private var flags: [Int: Bool] = [:]

    mutating func set(_ value: Int32, _ index: Int) { integers[index] = value }
    mutating func set(_ value: Bool, _ index: Int) { flags[index] = value }

    /// As the compiler takes them.
    var values: MTLFunctionConstantValues {
        let values = MTLFunctionConstantValues()
        for (index, value) in integers {
            withUnsafePointer(to: value) { values.setConstantValue($0, type: .int, index: index) }
        }
        for (index, value) in flags {
            withUnsafePointer(to: value) { values.setConstantValue($0, type: .bool, index: index) }
        }
        return values
    }
}

/// The kernels of one device, compiled when they are first used.
struct KernelLibrary {
    private let device: any MTLDevice
    private var libraries: [KernelSource: any MTLLibrary] = [:]
    private var pipelines: [Key: any MTLComputePipelineState] = [:]

    private struct Key: Hashable {
        let source: KernelSource
        let name: String
        let constants: KernelConstants
    }

    init(_ device: any MTLDevice) {
        self.device = device
    }

    /// The pipeline of a kernel with these constants.
    mutating func pipeline(
        _ name: String, of source: KernelSource, _ constants: KernelConstants
    ) throws(MFAError) -> any MTLComputePipelineState {
        let key = Key(source: source, name: name, constants: constants)
        if let pipeline = pipelines[key] { return pipeline }
        do {
            let library = try libraries[source] ?? makeLibrary(source)
            libraries[source] = library
            let function = try library.makeFunction(name: name, constantValues: constants.values)
            let pipeline = try device.makeComputePipelineState(function: function)
            pipelines[key] = pipeline
            return pipeline
        } catch {
            throw MFAError(.executionFailed, "the kernel \(name) could not be compiled: \(error)")
        }
    }

    /// Masks, empty rows and NaN need comparisons as IEEE 754 has them; where a fast function is good enough, the kernels name it.
    private func makeLibrary(_ source: KernelSource) throws -> any MTLLibrary {
        let options = MTLCompileOptions()
        // Brought bfloat. A compiler that does not have it says so.
        options.languageVersion = .version3_1
        if #available(macOS 15, iOS 18, *) {
            options.mathMode = .safe
        } else {
            options.fastMathEnabled = false
        }
        return try device.makeLibrary(source: source.text, options: options)
    }
}
