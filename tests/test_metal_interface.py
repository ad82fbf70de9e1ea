"""The comparison of our Swift module Metal with the framework's interface notices what differs, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import check_metal_interface
from check_metal_interface import compare, read

ROOT = Path(__file__).resolve().parent.parent
TOOL = ROOT / "tools" / "check_metal_interface.py"

# Written as the framework's interface is printed: other order, attributes, availability, module names, defaults, extensions, more members.
FRAMEWORK = """
import Foundation

@available(macOS 10.11, *)
public typealias MTLCommandBufferHandler = @Sendable (any MTLCommandBuffer) -> Void

/** A comment
 with lines. */
@available(macOS 10.15, *)
public enum MTLGPUFamily : Int, @unchecked Sendable {

    case apple1 = 1001

    case apple7 = 1007

    @available(macOS 14.0, *)
    case apple9 = 1009
}

public struct MTLSize {

    public init()

    public init(width: Int, height: Int, depth: Int)

    public var width: Int

    public var height: Int

    public var depth: Int
}

public protocol MTLResource : NSObjectProtocol, Sendable {

    var label: String? { get set }

    var device: any Metal.MTLDevice { get }
}

public protocol MTLBuffer : MTLResource {

    var length: Int { get }

    func contents() -> UnsafeMutableRawPointer
}

open class MTLCompileOptions : NSObject, NSCopying {

    @available(macOS, introduced: 10.11, deprecated: 15, message: "Use mathMode instead")
    open var fastMathEnabled: Bool
}

public protocol MTLCommandBuffer : NSObjectProtocol {

    func addCompletedHandler(_ block: @escaping MTLCommandBufferHandler)

    @available(*, noasync) func waitUntilCompleted()
}

extension MTLDevice {

    public func makeLibrary(source: String, options: MTLCompileOptions?) throws -> any MTLLibrary
}

public protocol MTLLibrary : NSObjectProtocol, Sendable {
}

public protocol MTLDevice : NSObjectProtocol, Sendable {

    func makeBuffer(length: Int, options: MTLResourceOptions = []) -> (any MTLBuffer)?

    func makeBuffer(bytesNoCopy pointer: UnsafeMutableRawPointer, length: Int, options: MTLResourceOptions = [],
                    deallocator: (@Sendable (UnsafeMutableRawPointer, Int) -> Void)? = nil) -> (any MTLBuffer)?
}

public func MTLCreateSystemDefaultDevice() -> (any MTLDevice)?
"""

OURS = """
// A comment.

/// Our own: of another framework.
public typealias CFTimeInterval = Double

public enum MTLGPUFamily: Int, Sendable {
    case apple7 = 1007
    case apple9 = 1009
}

public struct MTLSize: Sendable {
    public var width: Int
    public var height: Int
    public var depth: Int

    public init(width: Int, height: Int, depth: Int) {
        self.width = width
        self.height = height
        self.depth = depth
    }
}

public protocol MTLResource: AnyObject, Sendable {
    var label: String? { get set }
    var device: any MTLDevice { get }
}

public protocol MTLBuffer: MTLResource {
    var length: Int { get }
    func contents() -> UnsafeMutableRawPointer
}

public final class MTLCompileOptions {
    public var fastMathEnabled: Bool = true
    /// Our own: what it was asked for.
    public var asked: [Int: [UInt8]] = [:]
    let inner = 1
}

public protocol MTLCommandBuffer: AnyObject {
    func addCompletedHandler(_ block: @escaping @Sendable (any MTLCommandBuffer) -> Void)
    func waitUntilCompleted()
}

public protocol MTLLibrary: AnyObject, Sendable {}

public protocol MTLDevice: AnyObject, Sendable {
    func makeBuffer(length: Int, options: MTLResourceOptions) -> (any MTLBuffer)?
    func makeBuffer(
        bytesNoCopy pointer: UnsafeMutableRawPointer, length: Int, options: MTLResourceOptions,
        deallocator: ((UnsafeMutableRawPointer, Int) -> Void)?
    ) -> (any MTLBuffer)?
    func makeLibrary(source: String, options: MTLCompileOptions?) throws -> any MTLLibrary
}

public func MTLCreateSystemDefaultDevice() -> (any MTLDevice)? {
    SoftwareDevice.shared
}

/// Our own.
public func somethingElse() {}
"""


def test_what_is_spelled_otherwise__is_the_same():
    assert compare(read(OURS), read(FRAMEWORK)) == []


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("case apple7 = 1007", "case apple7 = 1008", "MTLGPUFamily.case apple7: ours is 1008, the framework's 1007"),
        ("case apple9 = 1009", "case apple11 = 1011", "MTLGPUFamily.case apple11: the framework has nothing of this name"),
        ("public enum MTLGPUFamily: Int", "public enum MTLGPUFamily: UInt", "MTLGPUFamily: ours is a UInt, the framework's is not"),
        ("var length: Int { get }", "var length: UInt { get }", "MTLBuffer.var length: ours is `var length: UInt`"),
        ("var length: Int { get }", "var length: Int { get set }", "MTLBuffer.var length: ours can be set, the framework's cannot"),
        ("var label: String?", "var label: String", "ours is `var label: String`, the framework's `var label: String?`"),
        (
            "func contents() -> UnsafeMutableRawPointer",
            "func contents() -> UnsafeRawPointer",
            "MTLBuffer.contents(): ours is `contents() -> UnsafeRawPointer`, the framework's `contents() -> UnsafeMutableRawPointer`",
        ),
        ("makeBuffer(length: Int,", "makeBuffer(size: Int,", "MTLDevice.makeBuffer(size:options:): the framework has nothing of this name"),
        ("bytesNoCopy pointer:", "bytesNoCopy memory:", "MTLDevice.makeBuffer(bytesNoCopy:length:options:deallocator:): ours is"),
        ("throws -> any MTLLibrary", "-> any MTLLibrary", "MTLDevice.makeLibrary(source:options:): ours is"),
        ("@escaping @Sendable (any MTLCommandBuffer)", "(any MTLCommandBuffer)", "MTLCommandBuffer.addCompletedHandler(_:): ours is"),
        ("protocol MTLBuffer: MTLResource", "protocol MTLBuffer: MTLHeap", "MTLBuffer: ours is a MTLHeap, the framework's is not"),
        ("protocol MTLLibrary", "protocol MTLArchive", "MTLArchive: the framework has no such type"),
        ("-> (any MTLDevice)? {", "-> any MTLDevice {", "MTLCreateSystemDefaultDevice(): ours is"),
        (
            "fastMathEnabled: Bool = true",
            "fastMathEnabled = true",
            "MTLCompileOptions.var fastMathEnabled: ours is `var fastMathEnabled: `",
        ),
        ("/// Our own.\n", "", "somethingElse(): the framework has nothing of this name"),
    ],
)
def test_a_difference__is_named(old, new, words):
    assert old in OURS
    lines = compare(read(OURS.replace(old, new)), read(FRAMEWORK))
    assert any(line.startswith(words) or words in line for line in lines), lines


def test_command_line__says_what_differs(tmp_path):
    ours, framework = tmp_path / "Interface.swift", tmp_path / "Metal.txt"
    ours.write_text(OURS)
    framework.write_text(FRAMEWORK)
    command = [sys.executable, str(TOOL), str(framework), "--source", str(ours)]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.stdout == "17 declarations of 8 types are as the framework has them\n", answer.stderr
    framework.write_text(FRAMEWORK.replace("waitUntilCompleted", "waitUntilScheduled"))
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 1
    assert "MTLCommandBuffer.waitUntilCompleted(): the framework has nothing of this name" in answer.stderr
    framework.write_text("public protocol MTLDevice { func (")
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 1
    assert "check_metal_interface: " in answer.stderr


@pytest.mark.skipif(not shutil.which("swift-synthesize-interface"), reason="needs swift-synthesize-interface")
def test_our_module__as_the_compiler_prints_it__is_what_its_source_declares(tmp_path):
    """That the tool reads what `swift-synthesize-interface` prints, here of our own module."""
    loader = ROOT / "core" / "SoftMetal" / "Loader" / "include"
    (tmp_path / "module.modulemap").write_text(f'module SoftMetalLoader {{ header "{loader}/softmetal_loader.h" export * }}\n')
    folder = ROOT / "core" / "SoftMetal" / "Metal"
    command = ["swiftc", "-emit-module", "-module-name", "Metal", "-swift-version", "6", "-I", str(tmp_path)]
    subprocess.run([*command, *map(str, folder.glob("*.swift")), "-o", str(tmp_path / "Metal.swiftmodule")], check=True)
    target = subprocess.run(["clang", "-print-target-triple"], capture_output=True, text=True, check=True).stdout.strip()
    printed = tmp_path / "Metal.txt"
    command = ["swift-synthesize-interface", "-module-name", "Metal", "-I", str(tmp_path), "-target", target, "-o", str(printed)]
    subprocess.run(command, check=True)
    ours = read(check_metal_interface.SOURCE.read_text())
    assert compare(ours, read(printed.read_text())) == []
    assert {"MTLDevice", "MTLBuffer", "MTLCommandBuffer", "MTLComputeCommandEncoder"} <= set(ours.types)
