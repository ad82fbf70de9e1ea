import CPUKernels
public func b() -> Int32 { x() }
