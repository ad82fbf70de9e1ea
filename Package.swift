// swift-tools-version:6.2
import PackageDescription

// Linker flags for the shipped library (version script, soname, static runtime) are on the command line of tools/build_library.py:
// a package with unsafe flags could not be depended on.
let package = Package(
    name: "mfa",
    platforms: [.macOS(.v14), .iOS(.v17)],
    products: [
        .library(name: "MFA", targets: ["MFA"]),
        .library(name: "mfa", type: .dynamic, targets: ["CABI"]),
    ],
    targets: [
        .systemLibrary(name: "CMFA", path: "include"),
        .target(name: "Support", path: "core/Support"),
        .target(name: "CPUKernels", path: "core/CPUKernels"),
        .target(name: "MFACore", path: "core/MFACore"),
        .target(name: "CPUBackend", dependencies: ["MFACore", "CPUKernels"], path: "core/CPUBackend"),
        .target(name: "MFA", dependencies: ["MFACore", "CPUBackend", "Support"], path: "core/MFA"),
        .target(name: "CABI", dependencies: ["CMFA", "MFA", "MFACore", "Support"], path: "core/CABI"),
        .testTarget(name: "MFATests", dependencies: ["MFA", "MFACore", "CABI", "CMFA"], path: "core/Tests"),
    ],
    swiftLanguageModes: [.v6],
    cLanguageStandard: .gnu17
)
