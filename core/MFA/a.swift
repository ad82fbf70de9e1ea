import CPUBackend
public func c() -> Int32 { b() }
