// swift-tools-version:6.2
import PackageDescription

// A Mac has the framework Metal. On Linux a module of that name stands for it, a device in software: docs/softmetal.md.
#if os(Linux)
let softMetal: [Target] = [
    .target(name: "SoftMetalLoader", path: "core/SoftMetal/Loader"),
    .target(name: "Metal", dependencies: ["SoftMetalLoader"], path: "core/SoftMetal/Metal"),
]
let metal: [Target.Dependency] = ["Metal"]
// Objective-C needs a compiler and a Foundation that Swift does not bring here: tools/build_objc.py.
let bridge: [Target] = []
let bridgeProducts: [Product] = []
#else
let softMetal: [Target] = []
let metal: [Target.Dependency] = []
let bridge: [Target] = [
    .target(
        name: "MFABridge", dependencies: ["CABI"], path: "objc/MFABridge", cSettings: [.headerSearchPath("../../include")],
        linkerSettings: [.linkedFramework("Foundation"), .linkedFramework("Metal")])
]
let bridgeProducts: [Product] = [.library(name: "MFABridge", targets: ["MFABridge"])]
#endif

// The conformance suite's program shares the objects of the library, and is nobody else's: tests/conformance/suite.py asks for it.
let conformance: [Target] =
    Context.environment["MFA_CONFORMANCE"] == nil
    ? [] : [.executableTarget(name: "conformance", dependencies: ["MFA"], path: "tests/conformance/swift")]

// Linker flags for the shipped library (version script, soname, static runtime) are on the command line of tools/build_library.py:
// a package with unsafe flags could not be depended on.
let package = Package(
    name: "mfa",
    platforms: [.macOS(.v14), .iOS(.v17)],
    products: [
        .library(name: "MFA", targets: ["MFA"]),
        .library(name: "mfa", type: .dynamic, targets: ["CABI"]),
    ] + bridgeProducts,
    targets: [
        .systemLibrary(name: "CMFA", path: "include"),
        .target(name: "Support", path: "core/Support"),
        .target(name: "CPUKernels", path: "core/CPUKernels"),
        .target(name: "MFACore", path: "core/MFACore"),
        .target(name: "CPUBackend", dependencies: ["MFACore", "CPUKernels"], path: "core/CPUBackend"),
        .target(
            name: "MetalBackend", dependencies: ["MFACore", "CPUBackend", "Support"] + metal, path: "core/MetalBackend",
            exclude: ["Kernels"]),
        .target(name: "MFA", dependencies: ["MFACore", "CPUBackend", "MetalBackend", "Support"] + metal, path: "core/MFA"),
        .target(name: "CABI", dependencies: ["CMFA", "MFA", "MFACore", "Support"], path: "core/CABI"),
        .testTarget(name: "MFATests", dependencies: ["MFA", "MFACore", "CABI", "CMFA"], path: "core/Tests"),
    ] + softMetal + bridge + conformance,
    swiftLanguageModes: [.v6],
    cLanguageStandard: .gnu17
)
