import CPUBackend
public import MFACore
import Metal
import MetalBackend

/// Which devices there are, and who computes on them: the one place that names backends.
enum DeviceRegistry {
    /// What a backend is made with.
    struct Options {
        let threads: Int
        let allocator: Allocator
    }

    /// Makes the backend of a device.
    static func makeBackend(_ device: Device, _ options: Options) throws(MFAError) -> any Backend {
        switch device {
        case .cpu:
            return try CPUBackend(threads: options.threads, allocator: options.allocator)
        case .auto:
            return try makeBackend(isAvailable(.metal) ? .metal : .cpu, options)
        case .metal, .softmetal:
            guard device == installed else {
                throw MFAError(.deviceUnavailable, "the device \"\(device)\" is not served by this build of the library")
            }
            return try makeMetal(options)
        }
    }

    /// Whether contexts can be created on a device.
    static func isAvailable(_ device: Device) -> Bool {
        switch device {
        case .auto, .cpu: true
        case .metal, .softmetal: device == installed && MetalBackend.isAvailable
        }
    }

    #if os(Linux)
    /// The device that the module Metal stands for here.
    private static let installed = Device.softmetal

    private static func makeMetal(_ options: Options) throws(MFAError) -> any Backend {
        if MTLCreateSystemDefaultDevice() == nil {
            throw MFAError(
                .deviceUnavailable, "the device \"softmetal\" needs libsoftmetal, a development tool: \(softMetalLoadError())")
        }
        // A pointer that a caller passes is an object of libsoftmetal's, which knows all that live.
        let objects = MetalObjects(
            buffer: { softMetalBuffer(at: $0) }, commandBuffer: { softMetalCommandBuffer(at: $0) })
        return try MetalBackend(
            .softmetal, named: "softmetal", threads: options.threads, allocator: options.allocator, objects: objects)
    }
    #else
    /// The device that the module Metal stands for here.
    private static let installed = Device.metal

    private static func makeMetal(_ options: Options) throws(MFAError) -> any Backend {
        let objects = MetalObjects(
            buffer: { object(at: $0) as? any MTLBuffer }, commandBuffer: { object(at: $0) as? any MTLCommandBuffer })
        return try MetalBackend(.metal, named: "metal", threads: options.threads, allocator: options.allocator, objects: objects)
    }

    /// A pointer that a caller passes is an Objective-C object, and is trusted to be one that lives.
    private static func object(at pointer: UnsafeMutableRawPointer) -> AnyObject {
        Unmanaged<AnyObject>.fromOpaque(pointer).takeUnretainedValue()
    }
    #endif
}

extension Device {
    /// Whether contexts can be created on this device here.
    public var isAvailable: Bool { DeviceRegistry.isAvailable(self) }
}
