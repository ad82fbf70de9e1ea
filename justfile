# Recipes for people and for continuous integration. ./justw RECIPE brings the tools; `just RECIPE` works too once .venv is there.

set positional-arguments
set shell := ["bash", "-euo", "pipefail", "-c"]

export PATH := justfile_directory() / ".venv/bin:" + env("PATH")

# List the recipes
default:
    @just --justfile "{{ justfile() }}" --list --unsorted

# Build libmfa and install the Python package `umfa` in place
build:
    @python tools/build_library.py
    @python tools/install.py package
    @{{ if os() == "linux" { "python tools/build_softmetal.py" } else { "true" } }}

# Run attention inside a real model over real text, at every precision: ./justw demo ["a question"]
demo *arguments: build extras
    @umfa demo "$@"

# Build and check everything, run all tests: what continuous integration runs
test: build extras check test-swift test-rust test-python

# Run the Python tests: ./justw test-python [options of pytest]
test-python *arguments: build extras
    @python -m pytest "$@"

# Run the Swift tests: ./justw test-swift [options of `swift test`]
test-swift *arguments:
    @swift test "$@"

# Check the Rust crates and the module umfa_rs: ./justw test-rust [options of `cargo test`]
test-rust *arguments: build
    @python tools/check_rust.py "$@"

# Check the kernels in C, emulating what this processor lacks: ./justw test-kernels [native|arm64|x86-64 ...] [--times 10] [--sanitize]
test-kernels *arguments:
    @python tools/check_kernels.py "$@"

# Build and run the examples of Objective-C
objc: build
    @python tools/build_objc.py --run

# Test MFABridge, the interface of Objective-C; on Linux over the software device. Installs GNUstep where apt-get may
test-objc *arguments: build
    @python -m pytest tests/test_objc.py "$@"

# Look for accesses beyond buffers in the Metal kernels, on the software device with AddressSanitizer
test-metal-asan: build
    @SOFTMETAL_SANITIZER=address python -m pytest tests/test_softmetal_device.py

# Look for races in the Metal kernels, on the software device with ThreadSanitizer
test-metal-tsan: build
    @SOFTMETAL_SANITIZER=thread python -m pytest tests/test_softmetal_device.py

# Run the conformance suite through every language and backend, and faults in short, and print the matrix: ./justw conformance [--write]
conformance *arguments: build
    @python -m pytest --quiet tests/test_conformance.py
    @python -m pytest --quiet tests/assurance
    @python tests/conformance/report.py "$@"

# Run the suites of faults in full size, and print their figures: ./justw assurance [--write]
assurance *arguments: build
    @MFA_ASSURANCE=full python -m pytest --quiet --timeout 1800 tests/assurance
    @python tests/assurance/report.py "$@"

# Fuzz the library with libFuzzer: ./justw fuzz [descriptor strides quantization training kernels] [--executions 100000]
fuzz *arguments:
    @python tools/fuzz.py "$@"

# Plant errors, one at a time, and see which test catches each: ./justw mutate [NAME ...] [--missing] [--list] [--jobs N]
mutate *arguments: build extras
    @python tools/mutate.py "$@"

# Check formats, lints, types and the record of the binary interface
check: build
    ruff format --check --quiet
    ruff check --quiet
    mypy
    clang-format --dry-run -Werror $(find core docs objc python/src tests/assurance tests/conformance tests/fuzzing tests/kernels -name '*.[chm]' -o -name '*.cpp')
    swift format lint --strict --parallel --recursive Package.swift core tests/conformance/swift
    python tools/check_abi.py --check
    python tools/embed_kernels.py --check
    python -m pytest --quiet tests/test_header.py

# Format all sources
fmt:
    ruff format --quiet
    ruff check --quiet --fix-only
    clang-format -i $(find core docs objc python/src tests/assurance tests/conformance tests/fuzzing tests/kernels -name '*.[chm]' -o -name '*.cpp')
    python tools/embed_kernels.py --update
    swift format --in-place --parallel --recursive Package.swift core tests/conformance/swift
    if command -v cargo > /dev/null; then cargo fmt --all --manifest-path rust/Cargo.toml; fi

# Measure speed, memory and error beside other engines: ./justw bench [forward decode ...] [--threads 1] [--quick] [--plot FILE]
bench *arguments: build extras
    @umfa bench "$@"

# Build the wheels of umfa and umfa_rs for this platform into dist/
wheels:
    cd python && hatchling build --target wheel --directory ../dist
    @python tools/rust_wheel.py

# Remove what was built; .venv stays
clean:
    rm -rf .build .build-* rust/target rust/umfa-rs/python/umfa_rs/_umfa_rs.* dist python/src/umfa/libmfa.* python/src/umfa/_mfa_cffi.py .venv/.stamp-umfa
    rm -rf .pytest_cache .hypothesis .ruff_cache .mypy_cache umfa-demo.png
    find bench python tests tools -name __pycache__ -prune -exec rm -rf {} +

# Install what tests and the demo use where it can be had: PyTorch for the CPU, the demo's model
[private]
extras:
    @python tools/install.py torch
    @python tools/install.py model
