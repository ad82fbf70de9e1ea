//! Contexts.

use std::cell::RefCell;
use std::sync::{Mutex, MutexGuard, PoisonError};

use pyo3::prelude::*;
use pyo3::types::PyString;

use crate::arrays::{choice, integer};
use crate::errors::{exception, of_crate, wrong_value};

/// A device with its threads and its workspace.
///
/// A context serves one call at a time; a second thread that uses it waits. Give each thread its own for calls that run side by side, or
/// pass none: functions without one use a default context, one a thread. It is closed at the end of a ``with`` block, by `close`, or when it
/// is collected.
///
/// Parameters
/// ----------
/// device : {"auto", "cpu", "metal", "softmetal"}
///     Where to compute: ``"auto"`` is Metal where there is one, else the CPU.
/// num_threads : int, optional
///     Threads of a call on the CPU, 1 to 256, the caller's included.
#[pyclass(frozen, module = "umfa_rs")]
pub struct MfaContext {
    context: Mutex<Option<mfa::MfaContext>>,
}

impl MfaContext {
    fn lock(&self) -> MutexGuard<'_, Option<mfa::MfaContext>> {
        // A panic elsewhere does not harm the context.
        self.context.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

thread_local! {
    /// The calling thread's default context, made at its first use.
    static DEFAULT: RefCell<Option<mfa::MfaContext>> = const { RefCell::new(None) };
}

/// Computes on a context, or on the thread's default one, with the interpreter's lock released.
pub fn compute<T: Send>(
    py: Python<'_>,
    function: &str,
    context: Option<&Bound<'_, PyAny>>,
    call: impl FnOnce(&mfa::MfaContext) -> mfa::Result<T> + Send,
) -> PyResult<T> {
    let result = match context {
        None => py.detach(|| {
            DEFAULT.with_borrow_mut(|default| {
                let context = match default.take() {
                    Some(context) => context,
                    None => mfa::MfaContext::new()?,
                };
                call(default.insert(context))
            })
        }),
        Some(object) => {
            let Ok(context) = object.cast::<MfaContext>() else {
                return Err(crate::errors::wrong_type(object, function, "context", "an umfa_rs.MfaContext"));
            };
            let context = context.get();
            py.detach(|| match context.lock().as_ref() {
                Some(context) => call(context),
                None => Err(mfa::Error::InvalidContext("context: expected an open one, got a closed one".into())),
            })
        }
    };
    result.map_err(|error| of_crate(py, function, &error))
}

#[pymethods]
impl MfaContext {
    #[new]
    #[pyo3(signature = (device = None, num_threads = None), text_signature = "(device='auto', num_threads=None)")]
    fn new(py: Python<'_>, device: Option<&Bound<'_, PyAny>>, num_threads: Option<&Bound<'_, PyAny>>) -> PyResult<Self> {
        let function = "MfaContext";
        let devices = [mfa::Device::Auto, mfa::Device::Cpu, mfa::Device::Metal, mfa::Device::SoftMetal];
        let device = match device {
            None => mfa::Device::Auto,
            Some(device) => devices[choice(function, "device", device, &["auto", "cpu", "metal", "softmetal"])?],
        };
        let num_threads = match num_threads {
            None => 0,
            Some(number) => match integer::<u32>(function, "num_threads", number, "a whole number from 1 to 256")? {
                number @ 1..=256 => number,
                number => {
                    return Err(wrong_value(py, function, &format!("num_threads: expected a whole number from 1 to 256, got {number}")));
                }
            },
        };
        let made = py.detach(|| mfa::MfaContext::builder().device(device).num_threads(num_threads).build());
        Ok(Self { context: Mutex::new(Some(made.map_err(|error| of_crate(py, function, &error))?)) })
    }

    /// Destroy the context; waits for a call that another thread has in it. Closing twice is harmless.
    fn close(&self, py: Python<'_>) {
        py.detach(|| self.lock().take());
    }

    /// True after `close`.
    #[getter]
    fn closed(&self, py: Python<'_>) -> bool {
        py.detach(|| self.lock().is_none())
    }

    /// ``"cpu"``, ``"metal"`` or ``"softmetal"``.
    #[getter]
    fn device(&self, py: Python<'_>) -> PyResult<&'static str> {
        Ok(self.info(py)?.device_name)
    }

    /// Threads that a call uses on the CPU.
    #[getter]
    fn num_threads(&self, py: Python<'_>) -> PyResult<u32> {
        Ok(self.info(py)?.num_threads)
    }

    /// What the CPU kernels in use were compiled for.
    #[getter]
    fn instruction_set(&self, py: Python<'_>) -> PyResult<&'static str> {
        Ok(self.info(py)?.instruction_set)
    }

    fn __enter__(slf: PyRef<'_, Self>) -> PyResult<PyRef<'_, Self>> {
        slf.info(slf.py())?;
        Ok(slf)
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, py: Python<'_>, _exception: &Bound<'_, PyAny>) {
        self.close(py);
    }

    fn __repr__(&self, py: Python<'_>) -> String {
        match self.info(py) {
            Ok(info) => {
                format!("<umfa_rs.MfaContext on {}, {} threads, {} kernels>", info.device_name, info.num_threads, info.instruction_set)
            }
            Err(_) => "<umfa_rs.MfaContext, closed>".into(),
        }
    }

    fn __reduce__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyString>> {
        let words = "umfa_rs.MfaContext: a context cannot be copied or pickled; create one where it is needed";
        Err(exception(py, "InvalidTypeError", words.into()))
    }
}

impl MfaContext {
    fn info(&self, py: Python<'_>) -> PyResult<mfa::ContextInfo> {
        let info = py.detach(|| match self.lock().as_ref() {
            Some(context) => context.info(),
            None => Err(mfa::Error::InvalidContext("expected an open context, got a closed one".into())),
        });
        info.map_err(|error| of_crate(py, "MfaContext", &error))
    }
}
