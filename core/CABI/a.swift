public import CMFA
import MFA
@c @implementation
public func mfa_version() -> UInt32 { UInt32(c()) }
