//! Where the module finds libmfa: beside itself, as in a wheel, or where it was built.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=UMFA_RS_RELOCATABLE");
    let Some(folder) = std::env::var_os("DEP_MFA_LIB_DIR").map(std::path::PathBuf::from) else {
        return; // documentation, which is not linked
    };
    // A wheel must not look where it was made; maturin puts the library into it and the path to it.
    if std::env::var_os("UMFA_RS_RELOCATABLE").is_none() {
        println!("cargo::rustc-link-arg-cdylib=-Wl,-rpath,{}", folder.display());
    }
    if cfg!(target_os = "macos") {
        println!("cargo::rustc-link-arg-cdylib=-undefined");
        println!("cargo::rustc-link-arg-cdylib=dynamic_lookup");
    }
}
