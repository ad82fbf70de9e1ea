import CMFA
import Testing

@Suite struct LibraryTests {
    @Test func versionIsThatOfTheHeader() {
        #expect(mfa_version() == UInt32(MFA_VERSION_MAJOR * 10000 + MFA_VERSION_MINOR * 100 + MFA_VERSION_PATCH))
        #expect(mfa_version_string().map { String(cString: $0) } == "\(MFA_VERSION_MAJOR).\(MFA_VERSION_MINOR).\(MFA_VERSION_PATCH)")
    }

    @Test func everyStatusHasWords() {
        let words = (0...8).map { mfa_status_string($0).map { String(cString: $0) } }
        #expect(Set(words).count == 9)
        #expect(words[8] == "unknown status")
        #expect(mfa_status_string(-1).map { String(cString: $0) } == "unknown status")
    }
}
