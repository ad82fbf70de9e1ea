//! Errors: the crate's as the exceptions of `umfa_rs.errors`.

use pyo3::prelude::*;

/// An exception of `umfa_rs.errors`, by its class's name.
pub fn exception(py: Python<'_>, class: &str, message: String) -> PyErr {
    let made = py.import("umfa_rs.errors").and_then(|module| module.getattr(class)).and_then(|class| class.call1((message,)));
    match made {
        Ok(value) => PyErr::from_value(value),
        Err(error) => error,
    }
}

/// The exception of an argument that has a wrong type.
pub fn wrong_type(argument: &Bound<'_, PyAny>, function: &str, name: &str, expected: &str) -> PyErr {
    let got = argument.repr().map_or_else(|_| "something without a repr".to_owned(), |text| text.to_string());
    exception(argument.py(), "InvalidTypeError", format!("umfa_rs.{function}: {name}: expected {expected}, got {got}"))
}

/// The exception of an argument that has a wrong value.
pub fn wrong_value(py: Python<'_>, function: &str, words: &str) -> PyErr {
    exception(py, "InvalidArgumentError", format!("umfa_rs.{function}: {words}"))
}

/// The exception of sizes that are illegal or do not match.
pub fn wrong_sizes(py: Python<'_>, function: &str, words: &str) -> PyErr {
    exception(py, "InvalidDimensionsError", format!("umfa_rs.{function}: {words}"))
}

/// The exception for an error of the crate's. Its message begins with the name of a function that the user did not call.
pub fn of_crate(py: Python<'_>, function: &str, error: &mfa::Error) -> PyErr {
    let class = match error {
        mfa::Error::InvalidContext(_) => "InvalidContextError",
        mfa::Error::AllocationFailed(_) => "OutOfMemoryError",
        mfa::Error::InvalidDimensions(_) => "InvalidDimensionsError",
        mfa::Error::ExecutionFailed(_) => "ExecutionError",
        mfa::Error::InvalidArgument(_) => "InvalidArgumentError",
        mfa::Error::Unsupported(_) => "UnsupportedError",
        mfa::Error::DeviceUnavailable(_) => "DeviceUnavailableError",
        _ => "MFAError",
    };
    let message = error.message();
    let words = match message.split_once(": ") {
        Some((name, words)) if name.starts_with("mfa") && !name.contains(' ') => words,
        _ => message,
    };
    exception(py, class, format!("umfa_rs.{function}: {words}"))
}
