import Testing
import CABI
@testable import MFA
@Test func t() { #expect(c() == 1) }
