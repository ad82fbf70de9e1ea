//! Contexts: a device, its threads and its workspace.

use std::cell::Cell;
use std::ffi::{CStr, c_void};
use std::marker::PhantomData;
use std::ptr::NonNull;

use mfa_sys as sys;

use crate::Precision;
use crate::error::{Error, Result, check};

/// Where attention is computed.
///
/// ```
/// assert!(mfa::Device::Cpu.is_available());
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Device {
    /// Metal where there is one, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// A Mac's GPU.
    Metal,
    /// The Metal kernels run in software, for tests on Linux.
    SoftMetal,
}

impl Device {
    /// Whether contexts can be created on this device here.
    ///
    /// ```
    /// use mfa::{Device, MfaContext};
    ///
    /// let context = MfaContext::builder().device(Device::Metal).build();
    /// assert_eq!(context.is_ok(), Device::Metal.is_available());
    /// ```
    pub fn is_available(self) -> bool {
        // SAFETY: a question about a number.
        unsafe { sys::mfa_device_is_available(self.code()) == 1 }
    }

    fn code(self) -> i32 {
        match self {
            Self::Auto => sys::MFA_DEVICE_AUTO,
            Self::Cpu => sys::MFA_DEVICE_CPU,
            Self::Metal => sys::MFA_DEVICE_METAL,
            Self::SoftMetal => sys::MFA_DEVICE_SOFTMETAL,
        }
    }
}

/// A device, its threads and its workspace; freed when it is dropped.
///
/// It serves one call at a time, so it may move to another thread, but two threads cannot share it: each makes its own. Results do not
/// depend on the number of threads.
///
/// ```
/// use mfa::MfaContext;
///
/// let context = MfaContext::builder().num_threads(2).build()?;
/// let threads = std::thread::spawn(move || context.info().map(|info| info.num_threads));
/// assert_eq!(threads.join().unwrap()?, 2);
/// # mfa::Result::Ok(())
/// ```
///
/// ```compile_fail,E0277
/// let context = mfa::MfaContext::new()?;
/// std::thread::scope(|threads| {
///     threads.spawn(|| context.info()); // a context cannot be shared between threads
/// });
/// # mfa::Result::Ok(())
/// ```
pub struct MfaContext {
    handle: NonNull<sys::mfa_context_t>,
    // A Cell may be sent to another thread and not be shared by two, as the context's last error demands.
    not_sync: PhantomData<Cell<()>>,
}

// SAFETY: the handle is a token that the library accepts on any thread, one call at a time, which the absence of Sync ensures.
unsafe impl Send for MfaContext {}

impl MfaContext {
    /// A context on the default device with default options.
    ///
    /// # Errors
    ///
    /// [`Error::DeviceUnavailable`] if `MFA_KERNELS` or `MFA_NUM_THREADS` asks for what is not here, [`Error::AllocationFailed`].
    ///
    /// ```
    /// let context = mfa::MfaContext::new()?;
    /// # mfa::Result::Ok(())
    /// ```
    pub fn new() -> Result<Self> {
        Self::builder().build()
    }

    /// Options of a context, then the context.
    ///
    /// ```
    /// let context = mfa::MfaContext::builder().device(mfa::Device::Cpu).num_threads(1).build()?;
    /// # mfa::Result::Ok(())
    /// ```
    pub fn builder() -> ContextBuilder {
        ContextBuilder::default()
    }

    /// What the context is and can do.
    ///
    /// # Errors
    ///
    /// None that this crate's user can cause.
    ///
    /// ```
    /// let info = mfa::MfaContext::new()?.info()?;
    /// println!("{} with {} kernels, {} threads", info.device_name, info.instruction_set, info.num_threads);
    /// # mfa::Result::Ok(())
    /// ```
    pub fn info(&self) -> Result<ContextInfo> {
        let mut info =
            sys::mfa_context_info_t { struct_size: size_of::<sys::mfa_context_info_t>() as u32, ..sys::mfa_context_info_t::default() };
        // SAFETY: the handle is valid, and the structure has the size that it claims.
        check(Some(self), unsafe { sys::mfa_context_get_info(self.handle(), &mut info) })?;
        // SAFETY: the library's strings are static.
        let (device_name, instruction_set) = unsafe { (static_text(info.device_name), static_text(info.instruction_set)) };
        Ok(ContextInfo {
            device_name,
            instruction_set,
            num_threads: info.num_threads,
            workspace_bytes: info.workspace_bytes,
            operand_precisions: info.operand_precisions,
        })
    }

    /// The context for C functions, which take it as a plain address.
    ///
    /// It is valid as long as `self` is; one thread at a time may use it.
    ///
    /// ```
    /// let context = mfa::MfaContext::new()?;
    /// assert!(!context.as_ptr().is_null());
    /// # mfa::Result::Ok(())
    /// ```
    pub fn as_ptr(&self) -> *mut c_void {
        self.handle.as_ptr().cast()
    }

    pub(crate) fn handle(&self) -> *mut sys::mfa_context_t {
        self.handle.as_ptr()
    }

    /// The result that a status stands for which a C function returned for this context, with the library's message.
    ///
    /// # Errors
    ///
    /// Whatever the status says.
    ///
    /// ```
    /// let context = mfa::MfaContext::new()?;
    /// assert!(context.check(mfa::sys::MFA_SUCCESS).is_ok());
    /// # mfa::Result::Ok(())
    /// ```
    pub fn check(&self, status: i32) -> Result<()> {
        check(Some(self), status)
    }
}

impl Drop for MfaContext {
    fn drop(&mut self) {
        // SAFETY: the handle is this context's own and not used after this. The status could only say that it is no context.
        unsafe { sys::mfa_destroy_context(self.as_ptr()) };
    }
}

impl std::fmt::Debug for MfaContext {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("MfaContext").field("info", &self.info()).finish()
    }
}

/// Options of an [`MfaContext`] that is to be made.
///
/// ```
/// let builder = mfa::MfaContext::builder().num_threads(1);
/// let contexts = [builder.build()?, builder.build()?];
/// # mfa::Result::Ok(())
/// ```
#[derive(Debug, Clone, Default)]
#[must_use = "a builder makes nothing until `build` is called"]
pub struct ContextBuilder {
    device: Device,
    num_threads: u32,
}

impl ContextBuilder {
    /// Where to compute; [`Device::Auto`] by default.
    ///
    /// ```
    /// let context = mfa::MfaContext::builder().device(mfa::Device::Cpu).build()?;
    /// assert_eq!(context.info()?.device_name, "cpu");
    /// # mfa::Result::Ok(())
    /// ```
    pub fn device(mut self, device: Device) -> Self {
        self.device = device;
        self
    }

    /// Threads of a call on the CPU, the caller's included, at most 256. By default, or with 0, the environment variable `MFA_NUM_THREADS`
    /// counts, else what the process may use.
    ///
    /// ```
    /// assert_eq!(mfa::MfaContext::builder().num_threads(3).build()?.info()?.num_threads, 3);
    /// # mfa::Result::Ok(())
    /// ```
    pub fn num_threads(mut self, num_threads: u32) -> Self {
        self.num_threads = num_threads;
        self
    }

    /// Makes the context.
    ///
    /// # Errors
    ///
    /// [`Error::DeviceUnavailable`] if the device is not here, [`Error::InvalidArgument`] for more than 256 threads,
    /// [`Error::AllocationFailed`].
    ///
    /// ```
    /// assert!(mfa::MfaContext::builder().num_threads(257).build().is_err());
    /// ```
    pub fn build(&self) -> Result<MfaContext> {
        let options = sys::mfa_context_options_t {
            struct_size: size_of::<sys::mfa_context_options_t>() as u32,
            device: self.device.code(),
            num_threads: self.num_threads,
            ..sys::mfa_context_options_t::default()
        };
        let mut handle = std::ptr::null_mut();
        // SAFETY: the structure has the size that it claims and no allocator; the handle's place is writable.
        check(None, unsafe { sys::mfa_create_context_with_options(&options, &mut handle) })?;
        match NonNull::new(handle) {
            Some(handle) => Ok(MfaContext { handle, not_sync: PhantomData }),
            None => Err(Error::InvalidContext("mfa::MfaContext: expected a context from the library, got none".into())),
        }
    }
}

/// What an [`MfaContext`] is and can do.
///
/// ```
/// let info = mfa::MfaContext::new()?.info()?;
/// assert!(info.serves(mfa::Precision::Int4));
/// # mfa::Result::Ok(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ContextInfo {
    /// `"cpu"`, `"metal"` or `"softmetal"`.
    pub device_name: &'static str,
    /// What the CPU kernels in use were compiled for: `"baseline"`, `"avx2"` …
    pub instruction_set: &'static str,
    /// Threads that a call uses on the CPU.
    pub num_threads: u32,
    /// Bytes of workspace that the context holds now.
    pub workspace_bytes: u64,
    operand_precisions: u64,
}

impl ContextInfo {
    /// Whether operands of this precision are served.
    ///
    /// ```
    /// let info = mfa::MfaContext::new()?.info()?;
    /// assert!(info.serves(mfa::Precision::Bf16));
    /// # mfa::Result::Ok(())
    /// ```
    pub fn serves(&self, precision: Precision) -> bool {
        self.operand_precisions >> precision.code() & 1 == 1
    }
}

/// The library's version, such as `"0.1.0"`.
///
/// ```
/// assert!(mfa::version().starts_with("0."));
/// ```
pub fn version() -> &'static str {
    // SAFETY: the string is static.
    unsafe { static_text(sys::mfa_version_string()) }
}

/// A static string of the library's.
///
/// # Safety
///
/// `string` is NULL or points to a string that ends with a zero and lives for ever.
pub(crate) unsafe fn static_text(string: *const std::ffi::c_char) -> &'static str {
    if string.is_null() {
        return "";
    }
    // SAFETY: the caller's promise.
    unsafe { CStr::from_ptr(string) }.to_str().unwrap_or("")
}
