//! Finds libmfa, or builds it from the Swift package around this crate, and makes the bindings from mfa.h.
//!
//! The library is linked into OUT_DIR and found there: cargo puts folders of its own on the search path of whatever it runs, so that
//! `cargo run` and `cargo test` need no run path.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

fn main() {
    if let Err(message) = build() {
        eprintln!("mfa-sys: {message}");
        std::process::exit(1);
    }
}

fn build() -> Result<(), String> {
    let manifest = PathBuf::from(variable("CARGO_MANIFEST_DIR")?);
    let out = PathBuf::from(variable("OUT_DIR")?);
    let header = manifest.join("mfa.h");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed={}", header.display());
    println!("cargo::rerun-if-env-changed=DOCS_RS");
    println!("cargo::rerun-if-env-changed=MFA_LIB_DIR");
    println!("cargo::rerun-if-env-changed=LIBCLANG_PATH");
    write_bindings(&header, &out.join("bindings.rs"))?;

    // Documentation is made where there may be neither the library nor Swift, and needs none.
    if env::var_os("DOCS_RS").is_some() {
        return Ok(());
    }
    let folder = match env::var_os("MFA_LIB_DIR") {
        Some(folder) => PathBuf::from(folder),
        None => build_library(&manifest)?,
    };
    let name = if variable("CARGO_CFG_TARGET_OS")? == "macos" { "libmfa.dylib" } else { "libmfa.so" };
    let library = folder.join(name).canonicalize().map_err(|error| format!("there is no {name} in {}: {error}", folder.display()))?;
    link(&library, &out.join(name))?;
    println!("cargo::rustc-link-search=native={}", out.display());
    println!("cargo::rustc-link-lib=dylib=mfa");
    // For build scripts of dependents: DEP_MFA_LIB_DIR.
    println!("cargo::metadata=lib_dir={}", library.parent().unwrap_or(&folder).display());
    Ok(())
}

fn variable(name: &str) -> Result<OsString, String> {
    env::var_os(name).ok_or_else(|| format!("{name} is not set; this program is run by cargo"))
}

fn write_bindings(header: &Path, bindings: &Path) -> Result<(), String> {
    find_libclang();
    let header = header.to_str().ok_or_else(|| format!("{} is not UTF-8", header.display()))?;
    bindgen::Builder::default()
        .header(header)
        .allowlist_function("mfa_.*")
        .allowlist_type("mfa_.*")
        .allowlist_var("MFA_.*")
        .default_macro_constant_type(bindgen::MacroTypeVariation::Signed)
        .derive_default(true)
        .generate_comments(false)
        .layout_tests(true)
        .use_core()
        .generate()
        .map_err(|error| format!("mfa.h: {error}"))?
        .write_to_file(bindings)
        .map_err(|error| format!("{}: {error}", bindings.display()))
}

/// Bindgen needs libclang. Swift, which builds the library, brings one along.
fn find_libclang() {
    if env::var_os("LIBCLANG_PATH").is_some() {
        return;
    }
    let name = if cfg!(target_os = "macos") { "libclang.dylib" } else { "libclang.so" };
    let paths = env::var_os("PATH").unwrap_or_default();
    for swift in env::split_paths(&paths).map(|folder| folder.join("swift")).filter_map(|program| program.canonicalize().ok()) {
        if let Some(folder) = swift.ancestors().nth(2).map(|usr| usr.join("lib")).filter(|folder| folder.join(name).exists()) {
            env::set_var("LIBCLANG_PATH", folder);
            return;
        }
    }
}

/// Builds libmfa by the script that knows its flags; returns its folder.
fn build_library(manifest: &Path) -> Result<PathBuf, String> {
    let root = manifest.join("../..");
    let script = root.join("tools/build_library.py");
    if !script.exists() {
        return Err("libmfa is needed: set MFA_LIB_DIR to its folder, or use this crate inside a clone of the repository".into());
    }
    for input in ["core", "include", "Package.swift", "tools/build_library.py"] {
        println!("cargo::rerun-if-changed={}", root.join(input).display());
    }
    let answer = Command::new("python3")
        .arg(&script)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("python3 builds libmfa: {error}; or set MFA_LIB_DIR to the library's folder"))?;
    let errors = String::from_utf8_lossy(&answer.stderr);
    if !answer.status.success() {
        return Err(format!("libmfa could not be built (MFA_LIB_DIR names the folder of one that is there):\n{errors}"));
    }
    let library = PathBuf::from(String::from_utf8_lossy(&answer.stdout).trim());
    library.parent().map(Path::to_path_buf).ok_or_else(|| format!("no library at {}", library.display()))
}

#[cfg(unix)]
fn link(library: &Path, place: &Path) -> Result<(), String> {
    // A link, because the library may be built anew without this program being run again.
    match std::fs::remove_file(place) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(format!("{}: {error}", place.display())),
        _ => {}
    }
    std::os::unix::fs::symlink(library, place).map_err(|error| format!("{}: {error}", place.display()))
}

#[cfg(not(unix))]
fn link(_: &Path, _: &Path) -> Result<(), String> {
    Err("libmfa is made for Linux and macOS".into())
}
