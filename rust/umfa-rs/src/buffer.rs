//! Buffers.

use std::ffi::c_int;
use std::sync::{Mutex, PoisonError};

use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::arrays::{Array, integer};
use crate::context::compute;
use crate::errors::{exception, wrong_sizes, wrong_type, wrong_value};

/// The memory itself. Views hold it, so that closing a buffer never takes memory from under them.
#[pyclass(frozen, module = "umfa_rs")]
pub struct Memory {
    // Before what it borrows: fields are dropped in this order.
    buffer: mfa::MfaBuffer<'static, i8>,
    writable: bool,
    _array: Option<Py<PyAny>>,
}

#[pymethods]
impl Memory {
    /// # Safety
    ///
    /// Python calls this with a place for a `Py_buffer`.
    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let memory = slf.get();
        let (data, size) = (memory.buffer.as_void_ptr(), memory.buffer.len() as isize);
        // SAFETY: the memory lives as long as this object, which the view holds.
        if unsafe { ffi::PyBuffer_FillInfo(view, slf.as_ptr(), data, size, (!memory.writable).into(), flags) } == -1 {
            return Err(PyErr::fetch(slf.py()));
        }
        Ok(())
    }
}

/// Memory with a size and a device's own handle.
///
/// Buffers are optional on the CPU, where any array will do. On a GPU, arrays that lie in a buffer are used without a copy. A buffer has the
/// buffer protocol; `array` gives NumPy arrays on it, without a copy.
///
/// Parameters
/// ----------
/// size : int
///     Bytes to allocate: zeroed, aligned to the page. 0 is legal.
/// context : MfaContext, optional
///     Whose device the memory is for.
#[pyclass(frozen, module = "umfa_rs")]
pub struct MfaBuffer {
    memory: Mutex<Option<Py<Memory>>>,
}

impl MfaBuffer {
    fn open<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Bound<'py, Memory>> {
        let memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        match memory.as_ref() {
            Some(memory) => Ok(memory.bind(py).clone()),
            None => Err(wrong_value(py, &format!("MfaBuffer.{name}"), "expected an open buffer, got a closed one")),
        }
    }

    fn of(py: Python<'_>, buffer: mfa::MfaBuffer<'static, i8>, writable: bool, array: Option<Py<PyAny>>) -> PyResult<Self> {
        let memory = Py::new(py, Memory { buffer, writable, _array: array })?;
        Ok(Self { memory: Mutex::new(Some(memory)) })
    }
}

#[pymethods]
impl MfaBuffer {
    #[new]
    #[pyo3(signature = (size, context = None))]
    fn new(py: Python<'_>, size: &Bound<'_, PyAny>, context: Option<&Bound<'_, PyAny>>) -> PyResult<Self> {
        let function = "MfaBuffer";
        let words = "size: expected a whole number of bytes from 0 to 2**63 - 1";
        let size: i64 = match integer::<i64>(function, "size", size, "a whole number of bytes") {
            Ok(size) => size,
            Err(error) if size.hasattr("__index__")? && !error.is_instance_of::<pyo3::exceptions::PyTypeError>(py) => {
                return Err(wrong_sizes(py, function, &format!("{words}, got {size}")));
            }
            Err(error) => return Err(error),
        };
        let Ok(size) = usize::try_from(size) else {
            return Err(wrong_sizes(py, function, &format!("{words}, got {size}")));
        };
        let buffer = compute(py, function, context, |context| mfa::MfaBuffer::new(context, size))?;
        Self::of(py, buffer, true, None)
    }

    /// A buffer on the memory of a contiguous array, without a copy; read-only if the array is.
    #[staticmethod]
    #[pyo3(signature = (array, context = None))]
    fn from_array(py: Python<'_>, array: &Bound<'_, PyAny>, context: Option<&Bound<'_, PyAny>>) -> PyResult<Self> {
        let function = "MfaBuffer.from_array";
        let array = Array::of(function, "array", array)?;
        let Some((data, length)) = array.contiguous() else {
            return Err(wrong_value(py, function, "array: expected a contiguous array; use .copy()"));
        };
        let item: usize = array.object.as_any().getattr("itemsize")?.extract()?;
        // SAFETY: NumPy's own address and size of contiguous memory, which the array keeps alive, and the buffer keeps the array. Only the
        // address is used; nothing is written to a read-only one, as no writable view of the buffer is given out.
        let bytes = unsafe { std::slice::from_raw_parts_mut(data.cast::<i8>(), length * item) };
        let buffer = compute(py, function, context, move |context| mfa::MfaBuffer::from_slice(context, bytes))?;
        Self::of(py, buffer, array.writable, Some(array.object.into_any().unbind()))
    }

    /// Bytes.
    #[getter]
    fn size(&self, py: Python<'_>) -> PyResult<usize> {
        Ok(self.open(py, "size")?.get().buffer.len())
    }

    /// The host address of the first byte.
    #[getter]
    fn address(&self, py: Python<'_>) -> PyResult<usize> {
        Ok(self.open(py, "address")?.get().buffer.as_void_ptr().addr())
    }

    /// True after `close`.
    #[getter]
    fn closed(&self) -> bool {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner).is_none()
    }

    /// A contiguous NumPy array on the buffer's memory, from byte `offset` on. It keeps the memory alive, also after `close`.
    #[pyo3(signature = (shape, dtype = None, offset = 0), text_signature = "($self, shape, dtype='float32', offset=0)")]
    fn array<'py>(
        &self,
        py: Python<'py>,
        shape: &Bound<'py, PyAny>,
        dtype: Option<&Bound<'py, PyAny>>,
        offset: i64,
    ) -> PyResult<Bound<'py, PyAny>> {
        let function = "MfaBuffer.array";
        let memory = self.open(py, "array")?;
        let numpy = py.import("numpy")?;
        let dtype = match dtype {
            Some(given) => numpy.call_method1("dtype", (given,)).map_err(|_| wrong_type(given, function, "dtype", "a dtype"))?,
            None => numpy.call_method1("dtype", ("float32",))?,
        };
        if dtype.getattr("hasobject")?.is_truthy()? {
            return Err(wrong_type(&dtype, function, "dtype", "plain numbers"));
        }
        // NumPy takes a negative one, and reads before the memory's begin.
        if offset < 0 {
            return Err(wrong_sizes(py, function, &format!("offset: expected at least 0, got {offset}")));
        }
        let options = PyDict::new(py);
        options.set_item("buffer", &memory)?;
        options.set_item("offset", offset)?;
        numpy.getattr("ndarray")?.call((shape, &dtype), Some(&options)).map_err(|error| {
            let size = memory.get().buffer.len();
            let words = format!("shape: expected at most {size} bytes, got {shape} of {dtype} from byte {offset} on ({error})");
            wrong_sizes(py, function, &words)
        })
    }

    /// Give the memory back, as soon as no array lies on it. Closing twice is harmless.
    fn close(&self) {
        // Dropped after the lock is.
        let _memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    /// # Safety
    ///
    /// Python calls this with a place for a `Py_buffer`.
    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let memory = slf.get().open(slf.py(), "__buffer__")?;
        // SAFETY: Python's own place for the view; what the view holds is the memory, so that closing the buffer leaves it valid.
        unsafe { Memory::__getbuffer__(memory, view, flags) }
    }

    fn __len__(&self, py: Python<'_>) -> PyResult<usize> {
        self.size(py)
    }

    fn __enter__(slf: PyRef<'_, Self>) -> PyResult<PyRef<'_, Self>> {
        slf.open(slf.py(), "__enter__")?;
        Ok(slf)
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, _exception: &Bound<'_, PyAny>) {
        self.close();
    }

    fn __repr__(&self, py: Python<'_>) -> String {
        self.size(py).map_or("<umfa_rs.MfaBuffer, closed>".into(), |size| format!("<umfa_rs.MfaBuffer of {size} bytes>"))
    }

    fn __reduce__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let words = "umfa_rs.MfaBuffer: a buffer cannot be copied or pickled; copy an array on it instead";
        Err(exception(py, "InvalidTypeError", words.into()))
    }
}
