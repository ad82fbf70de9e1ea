import CPUBackend
public import MFACore

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
        case .auto, .cpu:
            return try CPUBackend(threads: options.threads, allocator: options.allocator)
        case .metal:
            throw MFAError(.deviceUnavailable, "the device \"metal\" is not served by this build of the library")
        case .softmetal:
            throw MFAError(.deviceUnavailable, "the device \"softmetal\" is not served by this build of the library")
        }
    }

    /// Whether contexts can be created on a device.
    static func isAvailable(_ device: Device) -> Bool {
        switch device {
        case .auto, .cpu: true
        case .metal, .softmetal: false
        }
    }
}

extension Device {
    /// Whether contexts can be created on this device here.
    public var isAvailable: Bool { DeviceRegistry.isAvailable(self) }
}
