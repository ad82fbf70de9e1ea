// Apple's Metal for Linux: the names and signatures of the framework that core/MetalBackend uses, as Swift sees them on a Mac. The documents
// of the framework describe them: https://developer.apple.com/documentation/metal. Nothing here is of our own making, except where it says so.

import SoftMetalLoader

/// Our own: Core Foundation's, which is not here.
public typealias CFTimeInterval = Double

public struct MTLSize: Sendable {
    public var width: Int
    public var height: Int
    public var depth: Int

    public init(width: Int, height: Int, depth: Int) {
        self.width = width
        self.height = height
        self.depth = depth
    }
}

public struct MTLResourceOptions: OptionSet, Sendable {
    public let rawValue: UInt

    public init(rawValue: UInt) {
        self.rawValue = rawValue
    }

    public static let storageModeShared: MTLResourceOptions = []
}

public enum MTLDataType: UInt, Sendable {
    case int = 29
    case bool = 53
}

public enum MTLGPUFamily: Int, Sendable {
    case apple7 = 1007
    case apple8 = 1008
    case apple9 = 1009
    case apple10 = 1010
}

public enum MTLStorageMode: UInt, Sendable {
    case shared = 0
    case managed = 1
    case `private` = 2
    case memoryless = 3
}

public enum MTLMathMode: Int, Sendable {
    case safe = 0
    case relaxed = 1
    case fast = 2
}

public enum MTLCommandBufferStatus: UInt, Sendable {
    case notEnqueued = 0
    case enqueued = 1
    case committed = 2
    case scheduled = 3
    case completed = 4
    case error = 5
}

public enum MTLLanguageVersion: UInt, Sendable {
    case version3_1 = 196609
    case version3_2 = 196610
}

public final class MTLCompileOptions {
    public var languageVersion: MTLLanguageVersion = .version3_2
    public var fastMathEnabled: Bool = true
    public var mathMode: MTLMathMode = .fast

    public init() {}
}

public final class MTLFunctionConstantValues {
    /// Our own: the bytes of each value by its index.
    var values: [Int: [UInt8]] = [:]

    public init() {}

    public func setConstantValue(_ value: UnsafeRawPointer, type: MTLDataType, index: Int) {
        let size =
            switch type {
            case .int: 4
            case .bool: 1
            }
        values[index] = [UInt8](UnsafeRawBufferPointer(start: value, count: size))
    }
}

public protocol MTLResource: AnyObject, Sendable {
    var label: String? { get set }
    var device: any MTLDevice { get }
    var storageMode: MTLStorageMode { get }
}

public protocol MTLBuffer: MTLResource {
    var length: Int { get }
    func contents() -> UnsafeMutableRawPointer
}

public protocol MTLFunction: AnyObject, Sendable {
    var name: String { get }
}

public protocol MTLLibrary: AnyObject, Sendable {
    var functionNames: [String] { get }
    func makeFunction(name: String, constantValues: MTLFunctionConstantValues) throws -> any MTLFunction
}

public protocol MTLComputePipelineState: AnyObject, Sendable {
    var maxTotalThreadsPerThreadgroup: Int { get }
    var threadExecutionWidth: Int { get }
}

public protocol MTLCommandEncoder: AnyObject {
    func endEncoding()
}

public protocol MTLComputeCommandEncoder: MTLCommandEncoder {
    func setComputePipelineState(_ state: any MTLComputePipelineState)
    func setBuffer(_ buffer: (any MTLBuffer)?, offset: Int, index: Int)
    func setBytes(_ bytes: UnsafeRawPointer, length: Int, index: Int)
    func setThreadgroupMemoryLength(_ length: Int, index: Int)
    func dispatchThreadgroups(_ threadgroupsPerGrid: MTLSize, threadsPerThreadgroup: MTLSize)
    func dispatchThreads(_ threadsPerGrid: MTLSize, threadsPerThreadgroup: MTLSize)
}

public protocol MTLCommandBuffer: AnyObject {
    var device: any MTLDevice { get }
    var status: MTLCommandBufferStatus { get }
    var error: (any Error)? { get }
    var gpuStartTime: CFTimeInterval { get }
    var gpuEndTime: CFTimeInterval { get }
    func makeComputeCommandEncoder() -> (any MTLComputeCommandEncoder)?
    func addCompletedHandler(_ block: @escaping @Sendable (any MTLCommandBuffer) -> Void)
    func commit()
    func waitUntilCompleted()
}

public protocol MTLCommandQueue: AnyObject, Sendable {
    var device: any MTLDevice { get }
    func makeCommandBuffer() -> (any MTLCommandBuffer)?
    func makeCommandBufferWithUnretainedReferences() -> (any MTLCommandBuffer)?
}

public protocol MTLDevice: AnyObject, Sendable {
    var name: String { get }
    var maxThreadgroupMemoryLength: Int { get }
    func supportsFamily(_ gpuFamily: MTLGPUFamily) -> Bool
    func makeCommandQueue() -> (any MTLCommandQueue)?
    func makeBuffer(length: Int, options: MTLResourceOptions) -> (any MTLBuffer)?
    func makeBuffer(
        bytesNoCopy pointer: UnsafeMutableRawPointer, length: Int, options: MTLResourceOptions,
        deallocator: ((UnsafeMutableRawPointer, Int) -> Void)?
    ) -> (any MTLBuffer)?
    func makeLibrary(source: String, options: MTLCompileOptions?) throws -> any MTLLibrary
    func makeComputePipelineState(function: any MTLFunction) throws -> any MTLComputePipelineState
}

/// Nil where libsoftmetal is not to be had.
public func MTLCreateSystemDefaultDevice() -> (any MTLDevice)? {
    SoftwareDevice.shared
}

/// Our own: why there is no device.
public func softMetalLoadError() -> String {
    String(cString: softmetal_load_error())
}

/// Our own: that of Objective-C, which Metal brings along on a Mac. Here nothing is released later.
public func autoreleasepool<Failure, Result>(invoking body: () throws(Failure) -> Result) throws(Failure) -> Result {
    try body()
}
