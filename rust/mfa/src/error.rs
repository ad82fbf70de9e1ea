//! Errors: one variant for each status of the C library.

use std::ffi::CStr;

use mfa_sys as sys;

use crate::MfaContext;

/// Why a call was refused or failed. Each variant holds the message: the function, the argument, what was expected and what came.
///
/// But for [`Error::ExecutionFailed`] nothing has been written.
///
/// ```
/// use mfa::{Error, MfaContext, TensorView};
///
/// let error = TensorView::new(&[0.0f32; 5], [1, 1, 2, 3]).unwrap_err();
/// assert!(matches!(error, Error::InvalidDimensions(_)));
/// assert_eq!(error.status(), 3);
/// assert_eq!(error.to_string(), "mfa::TensorView: elements: expected 6 for the shape [1, 1, 2, 3], got 5");
/// ```
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The context is not one (status 1).
    #[error("{0}")]
    InvalidContext(String),
    /// Memory for a buffer or for workspace could not be had (status 2).
    #[error("{0}")]
    AllocationFailed(String),
    /// Sizes are illegal or disagree (status 3).
    #[error("{0}")]
    InvalidDimensions(String),
    /// A kernel failed (status 4). Outputs are undefined, the context stays usable.
    #[error("{0}")]
    ExecutionFailed(String),
    /// An argument has a value that is not allowed, or an output overlaps something (status 5).
    #[error("{0}")]
    InvalidArgument(String),
    /// The request is legal, but not served by this device or function (status 6).
    #[error("{0}")]
    Unsupported(String),
    /// The device is not here, or a Metal context is used in a child after `fork()` (status 7).
    #[error("{0}")]
    DeviceUnavailable(String),
    /// A status that this version of the crate does not know.
    #[error("{message} (status {status})")]
    Unknown {
        /// The status.
        status: i32,
        /// The library's message.
        message: String,
    },
}

/// A [`std::result::Result`] with this crate's [`Error`].
///
/// ```
/// fn threads() -> mfa::Result<u32> {
///     Ok(mfa::MfaContext::new()?.info()?.num_threads)
/// }
/// assert!(threads()? >= 1);
/// # mfa::Result::Ok(())
/// ```
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// The status of the C library, one of `mfa_sys::MFA_ERROR_*`.
    ///
    /// ```
    /// assert_eq!(mfa::Error::Unsupported("no such kernel".into()).status(), mfa::sys::MFA_ERROR_UNSUPPORTED);
    /// ```
    pub fn status(&self) -> i32 {
        match self {
            Self::InvalidContext(_) => sys::MFA_ERROR_INVALID_CONTEXT,
            Self::AllocationFailed(_) => sys::MFA_ERROR_ALLOCATION_FAILED,
            Self::InvalidDimensions(_) => sys::MFA_ERROR_INVALID_DIMENSIONS,
            Self::ExecutionFailed(_) => sys::MFA_ERROR_EXECUTION_FAILED,
            Self::InvalidArgument(_) => sys::MFA_ERROR_INVALID_ARGUMENT,
            Self::Unsupported(_) => sys::MFA_ERROR_UNSUPPORTED,
            Self::DeviceUnavailable(_) => sys::MFA_ERROR_DEVICE_UNAVAILABLE,
            Self::Unknown { status, .. } => *status,
        }
    }

    /// The message alone.
    ///
    /// ```
    /// assert_eq!(mfa::Error::Unsupported("no such kernel".into()).message(), "no such kernel");
    /// ```
    pub fn message(&self) -> &str {
        match self {
            Self::InvalidContext(message)
            | Self::AllocationFailed(message)
            | Self::InvalidDimensions(message)
            | Self::ExecutionFailed(message)
            | Self::InvalidArgument(message)
            | Self::Unsupported(message)
            | Self::DeviceUnavailable(message)
            | Self::Unknown { message, .. } => message,
        }
    }

    fn new(status: i32, message: String) -> Self {
        match status {
            sys::MFA_ERROR_INVALID_CONTEXT => Self::InvalidContext(message),
            sys::MFA_ERROR_ALLOCATION_FAILED => Self::AllocationFailed(message),
            sys::MFA_ERROR_INVALID_DIMENSIONS => Self::InvalidDimensions(message),
            sys::MFA_ERROR_EXECUTION_FAILED => Self::ExecutionFailed(message),
            sys::MFA_ERROR_INVALID_ARGUMENT => Self::InvalidArgument(message),
            sys::MFA_ERROR_UNSUPPORTED => Self::Unsupported(message),
            sys::MFA_ERROR_DEVICE_UNAVAILABLE => Self::DeviceUnavailable(message),
            _ => Self::Unknown { status, message },
        }
    }
}

/// The result that the status of a C function stands for; without a context, of one that was given none.
pub(crate) fn check(context: Option<&MfaContext>, status: i32) -> Result<()> {
    if status == sys::MFA_SUCCESS {
        return Ok(());
    }
    Err(last_error(context, status))
}

#[cold]
fn last_error(context: Option<&MfaContext>, status: i32) -> Error {
    let handle = context.map_or(std::ptr::null_mut(), MfaContext::handle);
    // SAFETY: the library recognises every handle, NULL too; its answer is a string that lives until the next failing call on this context
    // or, without one, on this thread. It is copied at once, and the context is not Sync, so no such call can be on its way.
    let message = unsafe { text(sys::mfa_last_error(handle)) };
    Error::new(status, message)
}

/// Copies a string of the library's; NULL is empty.
///
/// # Safety
///
/// `string` is NULL or points to a string that ends with a zero and lives during the call.
pub(crate) unsafe fn text(string: *const std::ffi::c_char) -> String {
    if string.is_null() {
        return String::new();
    }
    // SAFETY: the caller's promise.
    unsafe { CStr::from_ptr(string) }.to_string_lossy().into_owned()
}
