public func a() {}
