import MFACore
import Metal

/// Values of function constants, by their indices.
struct FunctionConstants: Hashable {
    private enum Value: Hashable {
        case int(Int32)
        case bool(Bool)
    }

    private var values: [Int: Value] = [:]

    mutating func set(_ value: Int32, _ index: Int) { values[index] = .int(value) }
    mutating func set(_ value: Bool, _ index: Int) { values[index] = .bool(value) }

    /// As the compiler takes them.
    fileprivate var compilerValues: MTLFunctionConstantValues {
        let compilerValues = MTLFunctionConstantValues()
        for (index, value) in values {
            switch value {
            case .int(let number): withUnsafePointer(to: number) { compilerValues.setConstantValue($0, type: .int, index: index) }
            case .bool(let flag): withUnsafePointer(to: flag) { compilerValues.setConstantValue($0, type: .bool, index: index) }
            }
        }
        return compilerValues
    }
}

/// The kernels of one device, compiled when they are first used.
struct Pipelines {
    private let device: any MTLDevice
    private var libraries: [String: any MTLLibrary] = [:]
    private var pipelines: [Key: any MTLComputePipelineState] = [:]

    private struct Key: Hashable {
        /// Of the kernel; a literal has one address as long as the process lives.
        let name: UnsafePointer<UInt8>
        let constants: FunctionConstants
    }

    init(_ device: any MTLDevice) {
        self.device = device
    }

    /// The pipeline of a kernel of one of `KernelSources`, specialised to function constants.
    mutating func pipeline(
        _ name: StaticString, in source: String, _ constants: FunctionConstants = FunctionConstants()
    ) throws(MFAError) -> any MTLComputePipelineState {
        let key = Key(name: name.utf8Start, constants: constants)
        if let pipeline = pipelines[key] { return pipeline }
        do {
            let library = try libraries[source] ?? makeLibrary(source)
            libraries[source] = library
            let function = try library.makeFunction(name: "\(name)", constantValues: constants.compilerValues)
            let pipeline = try device.makeComputePipelineState(function: function)
            pipelines[key] = pipeline
            return pipeline
        } catch {
            throw MFAError(.executionFailed, "the kernel \(name) could not be compiled: \(error)")
        }
    }

    /// Masks, empty rows and NaN need comparisons as IEEE 754 has them; where a fast function is good enough, the kernels name it.
    private func makeLibrary(_ source: String) throws -> any MTLLibrary {
        let options = MTLCompileOptions()
        options.languageVersion = .version3_1
        if #available(macOS 15, iOS 18, *) {
            options.mathMode = .safe
        } else {
            options.fastMathEnabled = false
        }
        return try device.makeLibrary(source: source, options: options)
    }
}
