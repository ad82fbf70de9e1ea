//! Quantised tensors and schemes.

use mfa::{Granularity, OperandScheme, Precision, TensorView, TensorViewMut};
use numpy::PyUntypedArrayMethods;
use pyo3::prelude::*;
use pyo3::types::PyString;

use crate::arrays::{Array, Layout, choice, empty_int32, empty_named, flag, integer, of_integers, part};
use crate::context::compute;
use crate::errors::{exception, of_crate, wrong_sizes, wrong_type, wrong_value};

const DTYPES: [&str; 2] = ["int8", "int4"];
const GRANULARITIES: [&str; 6] = ["tensor", "head", "token", "block", "channel", "group"];
const DEFAULT_BLOCK_SIZE: u32 = 64;
const DEFAULT_GROUP_SIZE: u32 = 32;

/// The granularity that a name and the sizes that may belong to it stand for.
fn granularity_of(
    function: &str,
    granularity: &Bound<'_, PyAny>,
    block_size: Option<&Bound<'_, PyAny>>,
    group_size: Option<&Bound<'_, PyAny>>,
) -> PyResult<Granularity> {
    let name = GRANULARITIES[choice(function, "granularity", granularity, &GRANULARITIES)?];
    let size = |kind: &str, given: Option<&Bound<'_, PyAny>>, default: u32| match given {
        Some(size) if name == kind => integer(function, &format!("{kind}_size"), size, "a whole number from 1 to 2**32 - 1"),
        Some(size) => {
            let words = format!("{kind}_size: expected None with granularity {name:?}, got {size}");
            Err(wrong_value(size.py(), function, &words))
        }
        None => Ok(default),
    };
    let block = size("block", block_size, DEFAULT_BLOCK_SIZE)?;
    let group = size("group", group_size, DEFAULT_GROUP_SIZE)?;
    let made = match name {
        "tensor" => Ok(Granularity::Tensor),
        "head" => Ok(Granularity::Head),
        "block" => Granularity::block(block),
        "channel" => Ok(Granularity::Channel),
        "group" => Granularity::group(group),
        _ => Ok(Granularity::Token),
    };
    made.map_err(|error| of_crate(granularity.py(), function, &error))
}

fn granularity_name(granularity: Granularity) -> &'static str {
    match granularity {
        Granularity::Tensor => "tensor",
        Granularity::Head => "head",
        Granularity::Block(_) => "block",
        Granularity::Channel => "channel",
        Granularity::Group(_) => "group",
        _ => "token",
    }
}

fn block_size(granularity: Granularity) -> Option<u32> {
    if let Granularity::Block(size) = granularity { Some(size.get()) } else { None }
}

fn group_size(granularity: Granularity) -> Option<u32> {
    if let Granularity::Group(size) = granularity { Some(size.get()) } else { None }
}

/// The shape of the scales of a tensor.
fn scales_shape(granularity: Granularity, shape: [usize; 4]) -> Vec<usize> {
    let [batch, heads, tokens, channels] = shape;
    match granularity {
        Granularity::Tensor => vec![],
        Granularity::Head => vec![batch, heads],
        Granularity::Block(size) => vec![batch, heads, tokens.div_ceil(size.get() as usize)],
        Granularity::Channel => vec![batch, heads, channels],
        Granularity::Group(size) => vec![batch, heads, tokens, channels.div_ceil(size.get() as usize)],
        _ => vec![batch, heads, tokens],
    }
}

/// How one tensor is quantised: the arguments of `quantize`, as a value.
///
/// Parameters
/// ----------
/// dtype : {"int8", "int4"}
///     Codes.
/// granularity : {"tensor", "head", "token", "block", "channel", "group"}, optional
///     Which elements share a scale; ``"token"`` by default, for INT4 with zero points.
/// block_size, group_size : int, optional
///     Tokens or channels that share a scale; 64 and 32 by default.
/// symmetric : bool, optional
///     False: with zero points. By default True, except for INT4 without a `granularity`.
/// smooth : bool
///     Subtract each channel's mean over the tokens first (keys only).
/// rotate : bool
///     Apply a Walsh-Hadamard transform to each row first (query and key alike).
#[pyclass(frozen, eq, hash, from_py_object, module = "umfa_rs")]
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct QuantizationScheme {
    precision: Precision,
    granularity: Granularity,
    #[pyo3(get)]
    symmetric: bool,
    #[pyo3(get)]
    smooth: bool,
    #[pyo3(get)]
    rotate: bool,
}

impl QuantizationScheme {
    #[allow(clippy::too_many_arguments)] // those of the Python function
    fn parse(
        function: &str,
        dtype: &Bound<'_, PyAny>,
        granularity: Option<&Bound<'_, PyAny>>,
        block_size: Option<&Bound<'_, PyAny>>,
        group_size: Option<&Bound<'_, PyAny>>,
        symmetric: Option<&Bound<'_, PyAny>>,
        smooth: Option<&Bound<'_, PyAny>>,
        rotate: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let is_int4 = choice(function, "dtype", dtype, &DTYPES)? == 1;
        let token = PyString::new(dtype.py(), "token").into_any();
        let truth =
            |name: &str, value: Option<&Bound<'_, PyAny>>, default: bool| value.map_or(Ok(default), |value| flag(function, name, value));
        Ok(Self {
            precision: if is_int4 { Precision::Int4 } else { Precision::Int8 },
            granularity: granularity_of(function, granularity.unwrap_or(&token), block_size, group_size)?,
            symmetric: truth("symmetric", symmetric, granularity.is_some() || !is_int4)?,
            smooth: truth("smooth", smooth, false)?,
            rotate: truth("rotate", rotate, false)?,
        })
    }

    fn scheme(&self) -> mfa::QuantizationScheme {
        let scheme = if self.precision == Precision::Int4 { mfa::QuantizationScheme::int4() } else { mfa::QuantizationScheme::int8() };
        scheme.granularity(self.granularity).symmetric(self.symmetric).smooth(self.smooth).rotate(self.rotate)
    }
}

#[pymethods]
impl QuantizationScheme {
    #[new]
    #[pyo3(signature = (dtype = None, granularity = None, block_size = None, group_size = None, symmetric = None, smooth = None, rotate = None),
           text_signature = "(dtype='int8', granularity=None, block_size=None, group_size=None, symmetric=None, smooth=False, rotate=False)")]
    #[allow(clippy::too_many_arguments)] // those of the Python function
    fn new(
        py: Python<'_>,
        dtype: Option<&Bound<'_, PyAny>>,
        granularity: Option<&Bound<'_, PyAny>>,
        block_size: Option<&Bound<'_, PyAny>>,
        group_size: Option<&Bound<'_, PyAny>>,
        symmetric: Option<&Bound<'_, PyAny>>,
        smooth: Option<&Bound<'_, PyAny>>,
        rotate: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let int8 = PyString::new(py, "int8").into_any();
        let dtype = dtype.unwrap_or(&int8);
        Self::parse("QuantizationScheme", dtype, granularity, block_size, group_size, symmetric, smooth, rotate)
    }

    /// ``"int8"`` or ``"int4"``.
    #[getter]
    fn dtype(&self) -> &'static str {
        dtype_name(self.precision)
    }

    /// Which elements share a scale.
    #[getter]
    fn granularity(&self) -> &'static str {
        granularity_name(self.granularity)
    }

    /// Tokens that share a scale; None unless the granularity is ``"block"``.
    #[getter]
    fn block_size(&self) -> Option<u32> {
        block_size(self.granularity)
    }

    /// Channels that share a scale; None unless the granularity is ``"group"``.
    #[getter]
    fn group_size(&self) -> Option<u32> {
        group_size(self.granularity)
    }

    fn __repr__(&self) -> String {
        let truth = |value: bool| if value { "True" } else { "False" };
        format!(
            "QuantizationScheme('{}', '{}', symmetric={}, smooth={}, rotate={})",
            self.dtype(),
            self.granularity(),
            truth(self.symmetric),
            truth(self.smooth),
            truth(self.rotate)
        )
    }
}

fn dtype_name(precision: Precision) -> &'static str {
    if precision == Precision::Int4 { "int4" } else { "int8" }
}

/// How `attention` quantises its float operands before it computes with them.
///
/// Each operand has a `QuantizationScheme`, or the name of a dtype, which stands for the scheme that suits the operand best, or None: it
/// stays as it is.
///
/// Parameters
/// ----------
/// query, key, value : QuantizationScheme or {"int8", "int4"}, optional
///     Scheme of each operand; ``"int8"`` by default.
#[pyclass(frozen, module = "umfa_rs")]
pub struct QuantizationConfig {
    config: mfa::QuantizationConfig,
    #[pyo3(get)]
    query: Py<PyAny>,
    #[pyo3(get)]
    key: Py<PyAny>,
    #[pyo3(get)]
    value: Py<PyAny>,
}

/// The scheme of one operand.
fn operand_scheme(name: &str, given: &Bound<'_, PyAny>) -> PyResult<Option<OperandScheme>> {
    if given.is_none() {
        return Ok(None);
    }
    if let Ok(scheme) = given.cast::<QuantizationScheme>() {
        return Ok(Some(scheme.get().scheme().into()));
    }
    let named = choice("QuantizationConfig", name, given, &DTYPES)?;
    Ok(Some(if named == 0 { OperandScheme::Int8 } else { OperandScheme::Int4 }))
}

#[pymethods]
impl QuantizationConfig {
    #[new]
    #[pyo3(signature = (query = Given::default(), key = Given::default(), value = Given::default()),
           text_signature = "(query='int8', key='int8', value='int8')")]
    fn new(py: Python<'_>, query: Given, key: Given, value: Given) -> PyResult<Self> {
        let [query, key, value] = [query, key, value].map(|given| given.0.unwrap_or_else(|| PyString::new(py, "int8").into_any().unbind()));
        Ok(Self {
            config: mfa::QuantizationConfig {
                query: operand_scheme("query", query.bind(py))?,
                key: operand_scheme("key", key.bind(py))?,
                value: operand_scheme("value", value.bind(py))?,
            },
            query,
            key,
            value,
        })
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let [query, key, value] = [&self.query, &self.key, &self.value].map(|part| part.bind(py).repr());
        Ok(format!("QuantizationConfig(query={}, key={}, value={})", query?, key?, value?))
    }
}

/// An argument for which None has a meaning of its own.
#[derive(Default)]
struct Given(Option<Py<PyAny>>);

impl<'a, 'py> FromPyObject<'a, 'py> for Given {
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        Ok(Self(Some(object.to_owned().unbind())))
    }
}

/// What an argument ``quantize=`` stands for.
pub fn config_of(function: &str, quantize: Option<&Bound<'_, PyAny>>) -> PyResult<mfa::QuantizationConfig> {
    let Some(quantize) = quantize else {
        return Ok(mfa::QuantizationConfig::default());
    };
    if let Ok(config) = quantize.cast::<QuantizationConfig>() {
        return Ok(config.get().config);
    }
    if !quantize.is_instance_of::<PyString>() {
        return Err(wrong_type(quantize, function, "quantize", "None, 'int8', 'int4' or an umfa_rs.QuantizationConfig"));
    }
    let named = choice(function, "quantize", quantize, &DTYPES)?;
    Ok(if named == 0 { mfa::QuantizationConfig::int8() } else { mfa::QuantizationConfig::int4() })
}

/// A tensor as INT8 or INT4 codes with scales; made by `quantize`, accepted by `attention` in place of an array.
///
/// Made directly, from parts that were stored, it shares their memory and checks their shapes.
///
/// Parameters
/// ----------
/// data : array
///     Codes. INT8: int8 of the tensor's shape. INT4: uint8 ``[..., ceil(head_dim / 2)]``, the even channel in the low nibble.
/// scales : array
///     float32, of the shape that the granularity says, in the order batch, heads, tokens, channels whatever the layout.
/// zero_points : array, optional
///     int32, of the shape of `scales`.
/// channel_means : array, optional
///     float32 ``[batch, heads, channels]``.
/// shape : tuple of int, optional
///     Shape of the tensor; needed for INT4.
/// granularity : str
///     Which elements share a scale.
/// block_size, group_size : int, optional
///     For those granularities.
/// rotated : bool
///     Whether the codes are those of the Walsh-Hadamard transform of each row.
/// layout : {"bhsd", "bshd"}
///     Order of the tensor's axes.
#[pyclass(frozen, module = "umfa_rs")]
pub struct QuantizedTensor {
    precision: Precision,
    data: Py<PyAny>,
    scales: Py<PyAny>,
    zero_points: Option<Py<PyAny>>,
    channel_means: Option<Py<PyAny>>,
    shape: Vec<usize>,
    granularity: Granularity,
    rotated: bool,
    pub layout: Layout,
}

/// The arrays of a [`QuantizedTensor`] while it is computed with.
pub struct Parts<'py> {
    data: Array<'py>,
    scales: Array<'py>,
    zero_points: Option<Array<'py>>,
    channel_means: Option<Array<'py>>,
}

impl QuantizedTensor {
    fn four(&self) -> Option<[usize; 4]> {
        self.layout.four(&self.shape, 1)
    }

    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    pub fn parts<'py>(&self, py: Python<'py>, function: &str, name: &str) -> PyResult<Parts<'py>> {
        // They were checked when they came in, and nobody can resize them while this tensor has them.
        let floats = |part: &Py<PyAny>| Array::of(function, name, part.bind(py));
        Ok(Parts {
            data: floats(&self.data)?,
            scales: floats(&self.scales)?,
            zero_points: self.zero_points.as_ref().map(|points| of_integers(points.bind(py))).transpose()?,
            channel_means: self.channel_means.as_ref().map(floats).transpose()?,
        })
    }

    /// The tensor as the crate takes it.
    pub fn view<'a>(&self, parts: &'a Parts<'_>, function: &str, name: &str) -> PyResult<TensorView<'a>> {
        let py = parts.data.py();
        let codes = if self.precision == Precision::Int4 {
            let view = self.four().and_then(|shape| parts.data.int4_view(shape, self.layout));
            view.ok_or_else(|| wrong_sizes(py, function, &format!("{name}: expected 2 to 4 axes")))?
        } else {
            parts.data.view(function, name, self.layout)?
        };
        let mut quantization = mfa::Quantization::new(self.granularity, floats(&parts.scales)).rotated(self.rotated);
        if let Some(zero_points) = &parts.zero_points {
            quantization = quantization.zero_points(ints(zero_points));
        }
        if let Some(means) = &parts.channel_means {
            quantization = quantization.channel_means(floats(means));
        }
        codes.quantized(quantization).map_err(|error| of_crate(py, function, &error))
    }
}

/// A view of an array of the user's, which he can neither resize nor give another shape.
fn view_of(array: &Array<'_>) -> PyResult<Py<PyAny>> {
    Ok(array.object.as_any().call_method0("view")?.unbind())
}

fn floats<'a>(array: &'a Array<'_>) -> &'a [f32] {
    array.slice::<f32>().unwrap_or(&[])
}

fn ints<'a>(array: &'a Array<'_>) -> &'a [i32] {
    match array.contiguous() {
        // SAFETY: zero points are a contiguous, aligned array of int32, which lives as long as `array`.
        Some((data, length)) => unsafe { std::slice::from_raw_parts(data.cast(), length) },
        None => &[],
    }
}

#[pymethods]
impl QuantizedTensor {
    #[new]
    #[pyo3(signature = (data, scales, zero_points = None, channel_means = None, *, shape = None, granularity = None, block_size = None,
                        group_size = None, rotated = None, layout = None),
           text_signature = "(data, scales, zero_points=None, channel_means=None, *, shape=None, granularity='token', block_size=None, \
                             group_size=None, rotated=False, layout='bhsd')")]
    #[allow(clippy::too_many_arguments)] // those of the Python function
    fn new<'py>(
        py: Python<'py>,
        data: &Bound<'py, PyAny>,
        scales: &Bound<'py, PyAny>,
        zero_points: Option<&Bound<'py, PyAny>>,
        channel_means: Option<&Bound<'py, PyAny>>,
        shape: Option<Vec<usize>>,
        granularity: Option<&Bound<'py, PyAny>>,
        block_size: Option<&Bound<'py, PyAny>>,
        group_size: Option<&Bound<'py, PyAny>>,
        rotated: Option<&Bound<'py, PyAny>>,
        layout: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Self> {
        let function = "QuantizedTensor";
        let data = Array::of(function, "data", data)?;
        let precision = match data.precision {
            Some(Precision::Int8) => Precision::Int8,
            None => Precision::Int4,
            Some(_) => return Err(wrong_type(data.object.dtype().as_any(), function, "data", "dtype int8, or uint8 for INT4")),
        };
        let shape = match shape {
            Some(shape) => shape,
            None if precision == Precision::Int8 => data.shape.clone(),
            None => return Err(wrong_value(py, function, "shape: expected the tensor's shape for INT4 data, got None")),
        };
        let mut stored = shape.clone();
        if let (Precision::Int4, Some(channels)) = (precision, stored.last_mut()) {
            *channels = channels.div_ceil(2);
        }
        if data.shape != stored {
            let words = format!("data: expected shape {stored:?} for a tensor of shape {shape:?}, got {:?}", data.shape);
            return Err(wrong_sizes(py, function, &words));
        }
        let layout = layout.map_or(Ok(Layout::Bhsd), |layout| Layout::parse(function, layout))?;
        let token = PyString::new(py, "token").into_any();
        let granularity = granularity_of(function, granularity.unwrap_or(&token), block_size, group_size)?;
        let four = layout.four(&shape, 1).ok_or_else(|| wrong_sizes(py, function, "data: expected 2 to 4 axes"))?;
        let expected = scales_shape(granularity, four);
        let part =
            |name: &str, values: &Bound<'py, PyAny>, dtype: &str, shape: &[usize]| view_of(&part(function, name, values, dtype, shape)?);
        let means_shape = [four[0], four[1], four[3]];
        Ok(Self {
            precision,
            scales: part("scales", scales, "float32", &expected)?,
            zero_points: zero_points.map(|points| part("zero_points", points, "int32", &expected)).transpose()?,
            channel_means: channel_means.map(|means| part("channel_means", means, "float32", &means_shape)).transpose()?,
            data: view_of(&data)?,
            shape,
            granularity,
            rotated: rotated.map_or(Ok(false), |rotated| flag(function, "rotated", rotated))?,
            layout,
        })
    }

    /// The codes.
    #[getter]
    fn data<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.data.bind(py).call_method0("view")
    }

    /// The scales, float32; their shape says the granularity.
    #[getter]
    fn scales<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.scales.bind(py).call_method0("view")
    }

    /// The zero points, int32, of the shape of `scales`; None for a symmetric tensor.
    #[getter]
    fn zero_points<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        self.zero_points.as_ref().map(|points| points.bind(py).call_method0("view")).transpose()
    }

    /// What smoothing subtracted, float32; None for a tensor that is not smoothed.
    #[getter]
    fn channel_means<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        self.channel_means.as_ref().map(|means| means.bind(py).call_method0("view")).transpose()
    }

    /// The shape of the tensor that the codes stand for.
    #[getter(shape)]
    fn shape_tuple<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, pyo3::types::PyTuple>> {
        pyo3::types::PyTuple::new(py, &self.shape)
    }

    /// ``"int8"`` or ``"int4"``.
    #[getter]
    fn dtype(&self) -> &'static str {
        dtype_name(self.precision)
    }

    /// Which elements share a scale.
    #[getter]
    fn granularity(&self) -> &'static str {
        granularity_name(self.granularity)
    }

    /// Tokens that share a scale; None unless the granularity is ``"block"``.
    #[getter]
    fn block_size(&self) -> Option<u32> {
        block_size(self.granularity)
    }

    /// Channels that share a scale; None unless the granularity is ``"group"``.
    #[getter]
    fn group_size(&self) -> Option<u32> {
        group_size(self.granularity)
    }

    /// Whether the codes are those of the Walsh-Hadamard transform of each row.
    #[getter]
    fn rotated(&self) -> bool {
        self.rotated
    }

    /// ``"bhsd"`` or ``"bshd"``.
    #[getter]
    fn layout(&self) -> &'static str {
        self.layout.name()
    }

    /// The number of axes.
    #[getter]
    fn ndim(&self) -> usize {
        self.shape.len()
    }

    /// Bytes of codes, scales, zero points and means together.
    #[getter]
    fn nbytes(&self, py: Python<'_>) -> PyResult<usize> {
        let parts = [Some(&self.data), Some(&self.scales), self.zero_points.as_ref(), self.channel_means.as_ref()];
        parts.into_iter().flatten().map(|part| part.bind(py).getattr("nbytes")?.extract::<usize>()).sum()
    }

    /// The real numbers that the codes stand for: float32, of the tensor's shape.
    #[pyo3(signature = (*, context = None))]
    fn dequantize<'py>(&self, py: Python<'py>, context: Option<&Bound<'py, PyAny>>) -> PyResult<Bound<'py, PyAny>> {
        let function = "QuantizedTensor.dequantize";
        let parts = self.parts(py, function, "data")?;
        let input = self.view(&parts, function, "data")?;
        let mut result = empty_named(function, py, &self.shape, "float32")?;
        let output = result.view_mut(function, "result", self.layout)?;
        compute(py, function, context, move |context| mfa::dequantize(context, input, output))?;
        Ok(result.object.into_any())
    }

    #[pyo3(signature = (*_arguments, **_options))]
    fn __array__<'py>(
        &self,
        py: Python<'py>,
        _arguments: &Bound<'py, PyAny>,
        _options: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let words = "umfa_rs.QuantizedTensor: use .dequantize() for its numbers or .data for its codes";
        Err(exception(py, "InvalidTypeError", words.into()))
    }

    fn __repr__(&self) -> String {
        format!("<umfa_rs.QuantizedTensor {} {:?}, scales by {}>", self.dtype(), self.shape, self.granularity())
    }
}

/// Quantise an array to INT8 or INT4.
///
/// Parameters
/// ----------
/// x : array
///     A float dtype, ``[batch, heads, tokens, channels]``, ``[batch, tokens, channels]`` or ``[tokens, channels]``; finite.
/// dtype, granularity, block_size, group_size, symmetric, smooth, rotate
///     As in `QuantizationScheme`.
/// layout : {"bhsd", "bshd"}
///     Order of the four axes.
/// context : MfaContext, optional
///     By default one a thread.
///
/// Returns
/// -------
/// QuantizedTensor
///     Codes of the layout of `x`.
#[pyfunction]
#[pyo3(signature = (x, dtype = None, granularity = None, block_size = None, group_size = None, symmetric = None, smooth = None,
                    rotate = None, layout = None, *, context = None),
       text_signature = "(x, dtype='int8', granularity=None, block_size=None, group_size=None, symmetric=None, smooth=False, \
                         rotate=False, layout='bhsd', *, context=None)")]
#[allow(clippy::too_many_arguments)] // those of the Python function
pub fn quantize<'py>(
    py: Python<'py>,
    x: &Bound<'py, PyAny>,
    dtype: Option<&Bound<'py, PyAny>>,
    granularity: Option<&Bound<'py, PyAny>>,
    block_size: Option<&Bound<'py, PyAny>>,
    group_size: Option<&Bound<'py, PyAny>>,
    symmetric: Option<&Bound<'py, PyAny>>,
    smooth: Option<&Bound<'py, PyAny>>,
    rotate: Option<&Bound<'py, PyAny>>,
    layout: Option<&Bound<'py, PyAny>>,
    context: Option<&Bound<'py, PyAny>>,
) -> PyResult<QuantizedTensor> {
    let function = "quantize";
    let int8 = PyString::new(py, "int8").into_any();
    let dtype = dtype.unwrap_or(&int8);
    let scheme = QuantizationScheme::parse(function, dtype, granularity, block_size, group_size, symmetric, smooth, rotate)?;
    let layout = layout.map_or(Ok(Layout::Bhsd), |layout| Layout::parse(function, layout))?;
    let input = Array::of(function, "x", x)?;
    if !input.is_float() {
        return Err(wrong_type(input.object.dtype().as_any(), function, "x", "a float dtype"));
    }
    let four = input.sizes(function, "x", layout)?;
    let is_int4 = scheme.precision == Precision::Int4;
    let mut stored = input.shape.clone();
    if let (true, Some(channels)) = (is_int4, stored.last_mut()) {
        *channels = channels.div_ceil(2);
    }
    let expected = scales_shape(scheme.granularity, four);
    let mut data = empty_named(function, py, &stored, if is_int4 { "uint8" } else { "int8" })?;
    let scales = empty_named(function, py, &expected, "float32")?;
    let zero_points = if scheme.symmetric { None } else { Some(empty_int32(py, &expected)?) };
    let means_shape = [four[0], four[1], four[3]];
    let means = if scheme.smooth { Some(empty_named(function, py, &means_shape, "float32")?) } else { None };
    {
        let view = input.view(function, "x", layout)?;
        let codes = if is_int4 {
            let codes = data.int4_view(four, layout).ok_or_else(|| wrong_sizes(py, function, "x: expected 2 to 4 axes"))?;
            // SAFETY: NumPy's memory of a new array, which nothing else knows.
            unsafe { TensorViewMut::from_raw_parts(Precision::Int4, data.data, codes.shape(), codes.strides()) }
        } else {
            data.view_mut(function, "data", layout)?
        };
        // SAFETY: new, contiguous arrays of these types, which nothing else knows.
        let (scales, points, means) = unsafe {
            (new_slice(&scales), zero_points.as_ref().map(|points| new_slice(points)), means.as_ref().map(|means| new_slice(means)))
        };
        let scheme = scheme.scheme();
        compute(py, function, context, move |context| mfa::quantize_into(context, view, scheme, codes, scales, points, means))?;
    }
    Ok(QuantizedTensor {
        precision: scheme.precision,
        data: data.object.into_any().unbind(),
        scales: scales.object.into_any().unbind(),
        zero_points: zero_points.map(|points| points.object.into_any().unbind()),
        channel_means: means.map(|means| means.object.into_any().unbind()),
        shape: input.shape.clone(),
        granularity: scheme.granularity,
        rotated: scheme.rotate,
        layout,
    })
}

/// The elements of a new, contiguous array.
///
/// # Safety
///
/// The array is aligned for T and has elements of its size, and nothing else uses it for as long as the slice is used.
pub unsafe fn new_slice<'a, T>(array: &Array<'_>) -> &'a mut [T] {
    match array.contiguous() {
        // SAFETY: the caller's promise; the length is the array's.
        Some((data, length)) => unsafe { std::slice::from_raw_parts_mut(data.cast(), length) },
        None => &mut [],
    }
}
