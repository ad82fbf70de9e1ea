//! NumPy arrays as the crate's views, and small arguments as Rust's values.

use std::ffi::c_void;

use mfa::{Precision, TensorView, TensorViewMut};
use numpy::npyffi::NPY_ARRAY_WRITEABLE;
use numpy::{PyArrayDescr, PyArrayDescrMethods, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyBytes, PyList, PyString, PyTuple};

use crate::errors::{wrong_sizes, wrong_type, wrong_value};

/// Where the axes of arrays are.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// Batch, heads, tokens, channels.
    Bhsd,
    /// Batch, tokens, heads, channels.
    Bshd,
}

impl Layout {
    pub fn parse(function: &str, layout: &Bound<'_, PyAny>) -> PyResult<Self> {
        Ok(if choice(function, "layout", layout, &["bhsd", "bshd"])? == 0 { Self::Bhsd } else { Self::Bshd })
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Bhsd => "bhsd",
            Self::Bshd => "bshd",
        }
    }

    /// Sizes or strides in the order batch, heads, tokens, channels; `missing` for axes that the array does not have.
    pub fn four<T: Copy>(self, values: &[T], missing: T) -> Option<[T; 4]> {
        match *values {
            [tokens, channels] => Some([missing, missing, tokens, channels]),
            [batch, tokens, channels] => Some([batch, missing, tokens, channels]),
            [batch, first, second, channels] if self == Self::Bhsd => Some([batch, first, second, channels]),
            [batch, first, second, channels] => Some([batch, second, first, channels]),
            _ => None,
        }
    }
}

/// An array that is used where it lies. It is kept alive.
pub struct Array<'py> {
    pub object: Bound<'py, PyUntypedArray>,
    /// None: `uint8`, which holds INT4 codes.
    pub precision: Option<Precision>,
    pub data: *mut c_void,
    pub shape: Vec<usize>,
    /// In elements.
    pub strides: Vec<isize>,
    pub writable: bool,
}

impl<'py> Array<'py> {
    /// The array that an object is or offers.
    pub fn of(function: &str, name: &str, object: &Bound<'py, PyAny>) -> PyResult<Self> {
        let array = untyped(function, name, object)?;
        let descriptor = array.dtype();
        let item = descriptor.itemsize();
        let precision = match (descriptor.kind(), item) {
            (b'f', 4) => Some(Precision::Fp32),
            (b'f', 2) => Some(Precision::Fp16),
            (b'f', 8) => Some(Precision::Fp64),
            (b'i', 1) => Some(Precision::Int8),
            (b'b', 1) => Some(Precision::Bool),
            (b'u', 1) => None,
            _ if is_named(&descriptor, "bfloat16")? => Some(Precision::Bf16),
            _ => {
                let expected = "dtype float32, float16, bfloat16, float64, int8, uint8 or bool";
                return Err(wrong_type(descriptor.as_any(), function, name, expected));
            }
        };
        if descriptor.is_native_byteorder() == Some(false) {
            return Err(wrong_value(
                object.py(),
                function,
                &format!("{name}: expected native byte order, got {descriptor}; use .astype()"),
            ));
        }
        // SAFETY: the pointer is that of a live array.
        let (data, flags) = unsafe { ((*array.as_array_ptr()).data.cast::<c_void>(), (*array.as_array_ptr()).flags) };
        let shape = array.shape().to_vec();
        let strides = array.strides().to_vec();
        let size = item as isize;
        let aligned = data.addr() % item == 0 && strides.iter().zip(&shape).all(|(stride, &length)| length < 2 || stride % size == 0);
        if !aligned && !shape.contains(&0) {
            return Err(wrong_value(object.py(), function, &format!("{name}: expected aligned elements; use .copy()")));
        }
        let strides = strides.iter().map(|stride| stride / size).collect();
        Ok(Self { precision, data, shape, strides, writable: flags & NPY_ARRAY_WRITEABLE != 0, object: array })
    }

    pub fn py(&self) -> Python<'py> {
        self.object.py()
    }

    pub fn is_float(&self) -> bool {
        self.precision.is_some_and(Precision::is_float)
    }

    fn wrong_axes(&self, function: &str, name: &str, layout: Layout) -> PyErr {
        let four = if layout == Layout::Bhsd { "[batch, heads, tokens, channels]" } else { "[batch, tokens, heads, channels]" };
        let words = format!("{name}: expected {four}, [batch, tokens, channels] or [tokens, channels], got {} axes", self.shape.len());
        wrong_sizes(self.py(), function, &words)
    }

    /// Sizes in the order batch, heads, tokens, channels.
    pub fn sizes(&self, function: &str, name: &str, layout: Layout) -> PyResult<[usize; 4]> {
        layout.four(&self.shape, 1).ok_or_else(|| self.wrong_axes(function, name, layout))
    }

    /// The view of an operand.
    pub fn view(&self, function: &str, name: &str, layout: Layout) -> PyResult<TensorView<'_>> {
        let (Some(shape), Some(strides)) = (layout.four(&self.shape, 1), layout.four(&self.strides, 0)) else {
            return Err(self.wrong_axes(function, name, layout));
        };
        let Some(precision) = self.precision else {
            let expected = "a float dtype or int8; INT4 codes come as a QuantizedTensor";
            return Err(wrong_type(self.object.as_any(), function, name, expected));
        };
        // SAFETY: NumPy's own address, shape and strides; the array is aligned and lives as long as `self`.
        Ok(unsafe { TensorView::from_raw_parts(precision, self.data, shape, strides) })
    }

    /// The view of codes of INT4, of a tensor with this shape.
    pub fn int4_view(&self, shape: [usize; 4], layout: Layout) -> Option<TensorView<'_>> {
        // In codes: two a byte, except that the channels' own stride is that of the bytes.
        let mut strides = layout.four(&self.strides, 0)?;
        strides[..3].iter_mut().for_each(|stride| *stride *= 2);
        // SAFETY: as in `view`; the array has half as many bytes a row as the shape has channels, rounded up.
        Some(unsafe { TensorView::from_raw_parts(Precision::Int4, self.data, shape, strides) })
    }

    /// The view of a result.
    pub fn view_mut(&mut self, function: &str, name: &str, layout: Layout) -> PyResult<TensorViewMut<'_>> {
        if !self.writable {
            return Err(wrong_value(self.py(), function, &format!("{name}: expected an array that may be written, got a read-only one")));
        }
        let view = self.view(function, name, layout)?;
        // SAFETY: as in `view`; the array may be written. While the library computes, Python's other threads are as free to use the array as
        // they are with any function of NumPy that works without the interpreter's lock.
        Ok(unsafe { TensorViewMut::from_raw_parts(view.precision(), self.data, view.shape(), view.strides()) })
    }

    /// The view of a mask or of its gradient: in the order of scores, whatever the layout; leading axes may be missing.
    pub fn scores_view(&self, function: &str, name: &str, axes: usize) -> PyResult<TensorView<'_>> {
        let Some(missing) = axes.checked_sub(self.shape.len()) else {
            let words = format!("{name}: expected at most {axes} axes, got shape {:?}", self.shape);
            return Err(wrong_sizes(self.py(), function, &words));
        };
        if !self.is_float() && self.precision != Some(Precision::Bool) {
            return Err(wrong_type(self.object.dtype().as_any(), function, name, "dtype bool or a float type"));
        }
        let full = |values: &[usize]| [vec![1; missing], values.to_vec()].concat();
        let shape = Layout::Bhsd.four(&full(&self.shape), 1);
        let strides = Layout::Bhsd.four(&[vec![0; missing], self.strides.clone()].concat(), 0);
        let (Some(shape), Some(strides), Some(precision)) = (shape, strides, self.precision) else {
            return Err(self.wrong_axes(function, name, Layout::Bhsd));
        };
        // SAFETY: as in `view`.
        Ok(unsafe { TensorView::from_raw_parts(precision, self.data, shape, strides) })
    }

    /// The elements of a contiguous array of this type, or None.
    pub fn slice<T: mfa::Element>(&self) -> Option<&[T]> {
        if self.precision != Some(T::PRECISION) {
            return None;
        }
        // SAFETY: NumPy's own address and length of an aligned, contiguous array of T that lives as long as `self`; the precision says so.
        self.contiguous().map(|(data, length)| unsafe { std::slice::from_raw_parts(data.cast(), length) })
    }

    /// The address and length of a contiguous array; never NULL.
    pub fn contiguous(&self) -> Option<(*mut c_void, usize)> {
        let length = self.shape.iter().product();
        if length == 0 {
            return Some((std::ptr::NonNull::<u64>::dangling().as_ptr().cast(), 0));
        }
        let mut expected = 1;
        for (&size, &stride) in self.shape.iter().zip(&self.strides).rev() {
            if size != 1 && stride != expected {
                return None;
            }
            expected *= size as isize;
        }
        Some((self.data, length))
    }
}

/// Whether a dtype has a name: NumPy has no number for bfloat16.
pub fn is_named(dtype: &Bound<'_, PyArrayDescr>, name: &str) -> PyResult<bool> {
    Ok(dtype.str()? == name)
}

/// Whatever has an array inside: NumPy's own, the buffer protocol, `__array__`, DLPack.
fn untyped<'py>(function: &str, name: &str, object: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyUntypedArray>> {
    let py = object.py();
    let expected = "an array";
    if let Ok(array) = object.cast_exact::<PyUntypedArray>() {
        return Ok(array.clone());
    }
    if object.is_instance_of::<PyString>()
        || object.is_instance_of::<PyBytes>()
        || object.is_instance_of::<PyList>()
        || object.is_instance_of::<PyTuple>()
    {
        return Err(wrong_type(object, function, name, expected));
    }
    if object.get_type().name()? == "MaskedArray" {
        return Err(wrong_type(object, function, name, "an array without a mask of its own; use .filled(), and mask= for attention"));
    }
    let numpy = py.import("numpy")?;
    let offers = ["__array_interface__", "__array_struct__", "__array__", "__buffer__"];
    let has_array =
        offers.iter().any(|offer| object.hasattr(*offer).unwrap_or(false)) || pyo3::buffer::PyUntypedBuffer::get(object).is_ok();
    let converter = if !has_array && object.hasattr("__dlpack__")? { "from_dlpack" } else { "asarray" };
    if !has_array && converter == "asarray" {
        return Err(wrong_type(object, function, name, expected));
    }
    match numpy.call_method1(converter, (object,)) {
        Ok(array) => array.cast_into::<PyUntypedArray>().map_err(|_| wrong_type(object, function, name, expected)),
        Err(error) => Err(wrong_type(object, function, name, &format!("{expected} ({error})"))),
    }
}

/// A new contiguous array.
pub fn empty<'py>(function: &str, py: Python<'py>, shape: &[usize], dtype: &Bound<'py, PyAny>) -> PyResult<Array<'py>> {
    Array::of(function, "result", &allocated(py, shape, dtype)?)
}

/// A new contiguous array of int32.
pub fn empty_int32<'py>(py: Python<'py>, shape: &[usize]) -> PyResult<Array<'py>> {
    of_integers(&allocated(py, shape, PyString::new(py, "int32").as_any())?)
}

fn allocated<'py>(py: Python<'py>, shape: &[usize], dtype: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    let shape = PyTuple::new(py, shape)?;
    py.import("numpy")?.call_method1("empty", (shape, dtype)).map_err(|error| {
        crate::errors::exception(py, "OutOfMemoryError", format!("umfa_rs: memory for a result could not be had: {error}"))
    })
}

/// The same of a dtype by its name.
pub fn empty_named<'py>(function: &str, py: Python<'py>, shape: &[usize], dtype: &str) -> PyResult<Array<'py>> {
    empty(function, py, shape, PyString::new(py, dtype).as_any())
}

/// A few numbers as a contiguous array of a dtype and shape.
pub fn numbers<'py>(
    function: &str,
    name: &str,
    values: &Bound<'py, PyAny>,
    kinds: &str,
    dtype: &str,
    shape: &[usize],
) -> PyResult<Array<'py>> {
    let py = values.py();
    let numpy = py.import("numpy")?;
    let expected = format!("{} of shape {shape:?}", if dtype == "int64" { "whole numbers" } else { "real numbers" });
    if values.is_instance_of::<PyString>() || values.is_instance_of::<PyBytes>() {
        return Err(wrong_type(values, function, name, &expected));
    }
    let array = numpy.call_method1("asarray", (values,)).map_err(|_| wrong_type(values, function, name, &expected))?;
    let array = array.cast_into::<PyUntypedArray>().map_err(|_| wrong_type(values, function, name, &expected))?;
    let kind = char::from(array.dtype().kind());
    let is_served = kinds.contains(kind) || (kinds.contains('f') && is_named(&array.dtype(), "bfloat16")?);
    if !is_served && array.len() > 0 {
        return Err(wrong_type(values, function, name, &expected));
    }
    if array.shape() != shape {
        return Err(wrong_sizes(py, function, &format!("{name}: expected {expected}, got shape {:?}", array.shape())));
    }
    let array = numpy.call_method1("require", (array, dtype, "C"))?;
    if dtype == "int64" { of_integers(&array) } else { Array::of(function, name, &array) }
}

/// An array of whole numbers, which are no precision of the library's.
pub fn of_integers<'py>(array: &Bound<'py, PyAny>) -> PyResult<Array<'py>> {
    let object = array.cast::<PyUntypedArray>()?.clone();
    // SAFETY: the pointer is that of a live array.
    let data = unsafe { (*object.as_array_ptr()).data.cast::<c_void>() };
    let item = object.dtype().itemsize().max(1) as isize;
    let strides = object.strides().iter().map(|stride| stride / item).collect();
    Ok(Array { precision: None, data, strides, shape: object.shape().to_vec(), writable: false, object })
}

/// A contiguous array of exactly this dtype, float32 or int32, and shape: scales, zero points, means.
pub fn part<'py>(function: &str, name: &str, values: &Bound<'py, PyAny>, dtype: &str, shape: &[usize]) -> PyResult<Array<'py>> {
    let array = untyped(function, name, values)?;
    if !is_named(&array.dtype(), dtype)? {
        return Err(wrong_type(array.dtype().as_any(), function, name, &format!("dtype {dtype}")));
    }
    if array.shape() != shape {
        let words = format!("{name}: expected shape {shape:?}, got {:?}", array.shape());
        return Err(wrong_sizes(values.py(), function, &words));
    }
    // A copy would not follow what is written to it later, as the codes do.
    // SAFETY: the pointer is that of a live array.
    let is_aligned = unsafe { (*array.as_array_ptr()).data } as usize % size_of::<f32>() == 0;
    if !(array.is_c_contiguous() && is_aligned) {
        let words = format!(
            "{name}: expected a contiguous array of aligned elements, whose memory is shared, got strides of {:?} bytes for shape {shape:?}: \
             pass a copy, or for a part of a cache all of it and kv_lengths",
            array.strides()
        );
        return Err(wrong_value(values.py(), function, &words));
    }
    if dtype == "int32" { of_integers(array.as_any()) } else { Array::of(function, name, array.as_any()) }
}

/// Whole numbers in 64 bits.
pub fn integers(function: &str, name: &str, values: &Bound<'_, PyAny>, length: usize) -> PyResult<Vec<i64>> {
    let array = numbers(function, name, values, "iu", "int64", &[length])?;
    array.object.as_any().call_method0("tolist")?.extract()
}

/// Which of some words an argument is.
pub fn choice(function: &str, name: &str, value: &Bound<'_, PyAny>, words: &[&str]) -> PyResult<usize> {
    let expected = format!("one of {words:?}");
    let Ok(text) = value.cast::<PyString>() else {
        return Err(wrong_type(value, function, name, &expected));
    };
    let text = text.to_string();
    words
        .iter()
        .position(|word| *word == text)
        .ok_or_else(|| wrong_value(value.py(), function, &format!("{name}: expected {expected}, got {text:?}")))
}

/// A real number.
pub fn real(function: &str, name: &str, value: &Bound<'_, PyAny>) -> PyResult<f64> {
    if value.is_instance_of::<PyString>() {
        return Err(wrong_type(value, function, name, "a real number"));
    }
    value.extract().map_err(|_| wrong_type(value, function, name, "a real number"))
}

/// A whole number.
pub fn integer<'a, 'py, T>(function: &str, name: &str, value: &'a Bound<'py, PyAny>, expected: &str) -> PyResult<T>
where
    T: FromPyObject<'a, 'py>,
{
    if value.is_instance_of::<PyBool>() {
        return Err(wrong_type(value, function, name, expected));
    }
    let Ok(index) = value.call_method0("__index__") else {
        return Err(wrong_type(value, function, name, expected));
    };
    value.extract().map_err(|_| wrong_value(value.py(), function, &format!("{name}: expected {expected}, got {index}")))
}

/// True or false.
pub fn flag(function: &str, name: &str, value: &Bound<'_, PyAny>) -> PyResult<bool> {
    if value.is_instance_of::<PyBool>() || value.get_type().name()? == "bool" {
        return value.is_truthy();
    }
    Err(wrong_type(value, function, name, "True or False"))
}
