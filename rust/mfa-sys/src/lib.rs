//! Raw bindings to libmfa, made from `mfa.h`, which documents every function and field.
//!
//! Use the crate `mfa` for a safe interface. This one is for calling the C functions by themselves: see `examples/first_attention.rs` and
//! `examples/c_functions.rs` of that crate for both ways.
//!
//! The library is looked for in the folder that `MFA_LIB_DIR` names; without it, a clone of the repository builds it (Swift >= 6.3 and
//! Python >= 3.10). A build script of a direct dependent finds the library's folder in `DEP_MFA_LIB_DIR`.
#![no_std]
#![allow(non_camel_case_types, missing_docs, clippy::undocumented_unsafe_blocks)]

include!(concat!(env!("OUT_DIR"), "/bindings.rs"));
