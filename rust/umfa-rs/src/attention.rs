//! Attention, forward and backward, on arrays.

use mfa::{Alignment, Attention, Gradients, Precision, Statistics, StatisticsMut, TensorView, TensorViewMut};
use numpy::{PyArrayDescrMethods, PyUntypedArrayMethods};
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyString, PyTuple};

use crate::arrays::{Array, Layout, choice, empty, empty_named, flag, integer, integers, is_named, numbers, real};
use crate::context::compute;
use crate::errors::{wrong_sizes, wrong_type, wrong_value};
use crate::quantization::{Parts, QuantizedTensor, config_of, new_slice};

const GRADIENTS: [&str; 6] = ["query", "key", "value", "mask", "sinks", "alibi_slopes"];

/// Query, key or value.
enum Operand<'py> {
    Array(Array<'py>),
    Quantized { tensor: Bound<'py, QuantizedTensor>, parts: Box<Parts<'py>> },
}

impl<'py> Operand<'py> {
    fn of(function: &str, name: &str, object: &Bound<'py, PyAny>, layout: Layout) -> PyResult<Self> {
        let Ok(tensor) = object.cast::<QuantizedTensor>() else {
            let array = Array::of(function, name, object)?;
            if !array.is_float() && array.precision != Some(Precision::Int8) {
                let expected = "dtype float32, float16, bfloat16, float64 or int8; INT4 codes come as a QuantizedTensor";
                return Err(wrong_type(array.object.dtype().as_any(), function, name, expected));
            }
            return Ok(Self::Array(array));
        };
        if tensor.get().layout != layout && tensor.get().shape().len() == 4 {
            let words = format!("{name}: expected a tensor of layout {:?}, got one of another", layout.name());
            return Err(wrong_value(object.py(), function, &words));
        }
        Ok(Self::Quantized { tensor: tensor.clone(), parts: Box::new(tensor.get().parts(object.py(), function, name)?) })
    }

    fn view(&self, function: &str, name: &str, layout: Layout) -> PyResult<TensorView<'_>> {
        match self {
            Self::Array(array) => array.view(function, name, layout),
            Self::Quantized { tensor, parts } => tensor.get().view(parts, function, name),
        }
    }

    fn shape(&self) -> &[usize] {
        match self {
            Self::Array(array) => &array.shape,
            Self::Quantized { tensor, .. } => tensor.get().shape(),
        }
    }

    /// The dtype of what is computed for this operand: its own if it is a float type, else float32.
    fn float_dtype(&self, py: Python<'py>) -> Bound<'py, PyAny> {
        match self {
            Self::Array(array) if array.is_float() => array.object.dtype().into_any(),
            _ => PyString::new(py, "float32").into_any(),
        }
    }

    fn is_double(&self) -> bool {
        matches!(self, Self::Array(array) if array.precision == Some(Precision::Fp64))
    }
}

/// The arguments of `attention` and `attention_backward` that are options, as they came.
struct Given<'a, 'py> {
    mask: Option<&'a Bound<'py, PyAny>>,
    causal: Option<&'a Bound<'py, PyAny>>,
    window: Option<&'a Bound<'py, PyAny>>,
    scale: Option<&'a Bound<'py, PyAny>>,
    softcap: Option<&'a Bound<'py, PyAny>>,
    alibi_slopes: Option<&'a Bound<'py, PyAny>>,
    sinks: Option<&'a Bound<'py, PyAny>>,
    kv_lengths: Option<&'a Bound<'py, PyAny>>,
    query_offset: Option<&'a Bound<'py, PyAny>>,
    dropout_p: Option<&'a Bound<'py, PyAny>>,
    seed: Option<&'a Bound<'py, PyAny>>,
    dropout_offset: Option<&'a Bound<'py, PyAny>>,
    quantize: Option<&'a Bound<'py, PyAny>>,
}

/// Operands and options, checked, and all memory that views of them point into.
struct Problem<'py> {
    layout: Layout,
    query: Operand<'py>,
    key: Operand<'py>,
    value: Operand<'py>,
    /// Batch, heads, tokens of the query, whatever the layout.
    rows: [usize; 3],
    double: bool,
    mask: Option<Array<'py>>,
    kv_lengths: Option<Vec<i64>>,
    query_offsets: Option<Vec<i64>>,
    alibi_slopes: Option<Array<'py>>,
    sinks: Option<Array<'py>>,
    options: Attention<'static>,
}

impl<'py> Problem<'py> {
    fn new(
        py: Python<'py>,
        function: &str,
        operands: [&Bound<'py, PyAny>; 3],
        layout: Option<&Bound<'py, PyAny>>,
        given: &Given<'_, 'py>,
        backward: bool,
    ) -> PyResult<Self> {
        let layout = layout.map_or(Ok(Layout::Bhsd), |layout| Layout::parse(function, layout))?;
        let query = Operand::of(function, "q", operands[0], layout)?;
        let key = Operand::of(function, "k", operands[1], layout)?;
        let value = Operand::of(function, "v", operands[2], layout)?;
        let axes = query.shape().len();
        for (name, operand) in [("q", &query), ("k", &key), ("v", &value)] {
            operand.view(function, name, layout)?;
            if operand.shape().len() != axes {
                let words = format!("{name}: expected {axes} axes like q, got {}", operand.shape().len());
                return Err(wrong_sizes(py, function, &words));
            }
        }
        let [batch, heads, tokens, _] = query.view(function, "q", layout)?.shape();
        let double = query.is_double() || key.is_double() || value.is_double();

        let vector = |name: &str, numbers_of: Option<&Bound<'py, PyAny>>| {
            let dtype = if double { "float64" } else { "float32" };
            numbers_of.map(|values| numbers(function, name, values, "iuf", dtype, &[heads])).transpose()
        };
        let mask = given.mask.map(|mask| Array::of(function, "mask", mask)).transpose()?;
        if let Some(mask) = &mask {
            mask.scores_view(function, "mask", axes)?;
        }
        Ok(Self {
            layout,
            rows: [batch, heads, tokens],
            double,
            mask,
            kv_lengths: given.kv_lengths.map(|lengths| integers(function, "kv_lengths", lengths, batch)).transpose()?,
            query_offsets: given.query_offset.map(|offset| query_offsets(function, offset, batch)).transpose()?,
            alibi_slopes: vector("alibi_slopes", given.alibi_slopes)?,
            sinks: vector("sinks", given.sinks)?,
            options: options(py, function, given, backward)?,
            query,
            key,
            value,
        })
    }

    fn axes(&self) -> usize {
        self.query.shape().len()
    }

    /// The options with what they borrow.
    fn attention<'a>(&'a self, function: &str) -> PyResult<Attention<'a>> {
        let mut attention: Attention<'a> = self.options.clone();
        if let Some(mask) = &self.mask {
            attention = attention.mask(mask.scores_view(function, "mask", self.axes())?);
        }
        if let Some(lengths) = &self.kv_lengths {
            attention = attention.kv_lengths(lengths);
        }
        if let Some(offsets) = &self.query_offsets {
            attention = attention.query_offsets(offsets);
        }
        if let Some(slopes) = &self.alibi_slopes {
            attention = attention.alibi_slopes(statistics(function, "alibi_slopes", slopes)?);
        }
        if let Some(sinks) = &self.sinks {
            attention = attention.sinks(statistics(function, "sinks", sinks)?);
        }
        Ok(attention)
    }

    fn views(&self, function: &str) -> PyResult<[TensorView<'_>; 3]> {
        Ok([
            self.query.view(function, "q", self.layout)?,
            self.key.view(function, "k", self.layout)?,
            self.value.view(function, "v", self.layout)?,
        ])
    }

    /// The shape of logsumexp: without the axes that the query does not have.
    fn statistics_shape(&self) -> Vec<usize> {
        let [batch, heads, tokens] = self.rows;
        match self.axes() {
            4 => vec![batch, heads, tokens],
            3 => vec![batch, tokens],
            _ => vec![tokens],
        }
    }

    fn statistics_dtype(&self) -> &'static str {
        if self.double { "float64" } else { "float32" }
    }

    /// A row statistic that the caller passes; contiguous, or copied to be so.
    fn given_statistics(&self, function: &str, name: &str, values: &Bound<'py, PyAny>) -> PyResult<Array<'py>> {
        let array = Array::of(function, name, values)?;
        let expected = if self.double { Precision::Fp64 } else { Precision::Fp32 };
        if array.precision != Some(expected) {
            return Err(wrong_type(array.object.dtype().as_any(), function, name, &format!("dtype {}", self.statistics_dtype())));
        }
        numbers(function, name, array.object.as_any(), "f", self.statistics_dtype(), &self.statistics_shape())
    }

    /// A float array of as many axes as the query has.
    fn float_input(&self, function: &str, name: &str, object: &Bound<'py, PyAny>) -> PyResult<Array<'py>> {
        let array = Array::of(function, name, object)?;
        if !array.is_float() {
            return Err(wrong_type(array.object.dtype().as_any(), function, name, "a float dtype"));
        }
        if array.shape.len() != self.axes() {
            let words = format!("{name}: expected {} axes like q, got shape {:?}", self.axes(), array.shape);
            return Err(wrong_sizes(object.py(), function, &words));
        }
        Ok(array)
    }
}

/// Numbers of an array that is contiguous and of float32 or float64.
fn statistics<'a>(function: &str, name: &str, array: &'a Array<'_>) -> PyResult<Statistics<'a>> {
    match (array.slice::<f32>(), array.slice::<f64>()) {
        (Some(numbers), _) => Ok(Statistics::Fp32(numbers)),
        (_, Some(numbers)) => Ok(Statistics::Fp64(numbers)),
        _ => Err(wrong_type(array.object.as_any(), function, name, "contiguous numbers of float32 or float64")),
    }
}

/// The same of an array that was made for a result.
///
/// # Safety
///
/// Nothing else uses the array for as long as the numbers are used.
unsafe fn new_statistics<'a>(array: &Array<'_>) -> StatisticsMut<'a> {
    // SAFETY: the caller's promise; the precision says what the elements are.
    unsafe {
        if array.precision == Some(Precision::Fp64) { StatisticsMut::Fp64(new_slice(array)) } else { StatisticsMut::Fp32(new_slice(array)) }
    }
}

fn query_offsets(function: &str, offset: &Bound<'_, PyAny>, batch: usize) -> PyResult<Vec<i64>> {
    let is_number = offset.hasattr("__index__")? && !offset.getattr("shape").is_ok_and(|shape| shape.len().is_ok_and(|axes| axes > 0));
    if is_number {
        return Ok(vec![integer(function, "query_offset", offset, "a whole number of 64 bits")?]);
    }
    integers(function, "query_offset", offset, batch)
}

/// The options that borrow nothing.
fn options(py: Python<'_>, function: &str, given: &Given<'_, '_>, backward: bool) -> PyResult<Attention<'static>> {
    let mut attention = Attention::new().quantize(config_of(function, given.quantize)?);
    if let Some(causal) = given.causal {
        if causal.is_instance_of::<PyString>() {
            let alignment = choice(function, "causal", causal, &["upper_left", "lower_right"])?;
            attention = attention.causal([Alignment::UpperLeft, Alignment::LowerRight][alignment]);
        } else if causal.is_instance_of::<PyBool>() || causal.get_type().name()? == "bool" {
            attention = if causal.is_truthy()? { attention.causal(Alignment::UpperLeft) } else { attention };
        } else {
            return Err(wrong_type(causal, function, "causal", "False, True, 'upper_left' or 'lower_right'"));
        }
    }
    if let Some(window) = given.window {
        let (left, right) = sides(function, window)?;
        attention = attention.window(left, right);
    }
    if let Some(scale) = given.scale {
        attention = attention.softmax_scale(real(function, "scale", scale)?);
    }
    if let Some(softcap) = given.softcap {
        attention = attention.softcap(real(function, "softcap", softcap)?);
    }
    let probability = given.dropout_p.map_or(Ok(0.0), |probability| real(function, "dropout_p", probability))?;
    let offset = match given.dropout_offset {
        Some(offset) => integer(function, "dropout_offset", offset, "a whole number from 0 to 2**32 - 1")?,
        None => 0,
    };
    let seed = match given.seed {
        Some(seed) => integer(function, "seed", seed, "a whole number from 0 to 2**64 - 1")?,
        None if probability > 0.0 && backward => {
            let words = format!("seed: expected that of the forward call, as dropout_p is {probability}, got None");
            return Err(wrong_value(py, function, &words));
        }
        None if probability > 0.0 => py.import("secrets")?.call_method1("randbits", (64,))?.extract()?,
        None => 0,
    };
    Ok(attention.dropout(probability, seed, offset))
}

fn sides(function: &str, window: &Bound<'_, PyAny>) -> PyResult<(Option<u64>, Option<u64>)> {
    let expected = "(left, right)";
    if window.is_instance_of::<PyString>() || !window.hasattr("__len__")? {
        return Err(wrong_type(window, function, "window", expected));
    }
    let sides: Vec<Bound<'_, PyAny>> =
        window.try_iter().and_then(Iterator::collect).map_err(|_| wrong_type(window, function, "window", expected))?;
    let [left, right] = &sides[..] else {
        let words = format!("window: expected two numbers, (left, right), got {}", sides.len());
        return Err(wrong_value(window.py(), function, &words));
    };
    let side = |side: &Bound<'_, PyAny>| {
        let expected = "a whole number from -1 to 2**63 - 1";
        let number: i64 = integer(function, "window", side, expected)?;
        match number {
            -1 => Ok(None),
            0.. => Ok(Some(number.unsigned_abs())),
            _ => Err(wrong_value(side.py(), function, &format!("window: expected {expected}, got {number}"))),
        }
    };
    Ok((side(left)?, side(right)?))
}

/// Scaled dot-product attention, exact or quantised, in memory that does not grow with the product of the sequence lengths.
///
/// Parameters
/// ----------
/// q, k, v : array or QuantizedTensor
///     Queries ``[batch, num_heads, seq_len_q, head_dim]``, keys and values ``[batch, num_kv_heads, seq_len_kv, ...]``; without heads, or
///     without both, as three or two axes. float32, float16, bfloat16, float64 or int8. Used where they lie, whatever their strides.
/// mask : array, optional
///     bool (True: attend) or a float type (added to the scores). Broadcasts to ``[batch, num_heads, seq_len_q, seq_len_kv]``.
/// causal : bool or {"upper_left", "lower_right"}
///     Row i attends columns up to ``i + off``: off is 0, or with ``"lower_right"`` ``seq_len_kv - seq_len_q``.
/// window : tuple of int, optional
///     ``(left, right)``: row i attends columns from ``i + off - left`` to ``i + off + right``; -1 is no limit.
/// scale : float, optional
///     Factor of the scores; ``1 / sqrt(head_dim)`` by default.
/// softcap : float
///     If not 0, scores s become ``softcap * tanh(s / softcap)`` before the mask is added.
/// alibi_slopes, sinks : array, optional
///     ``[num_heads]``.
/// kv_lengths : array of int, optional
///     ``[batch]``: keys and values from there on are not read.
/// query_offset : int or array of int, optional
///     off itself, one number or one a batch.
/// dropout_p, seed, dropout_offset
///     Dropout, and what determines it; a seed is drawn by default.
/// layout : {"bhsd", "bshd"}
///     Order of the four axes: heads before tokens or after them.
/// quantize : {"int8", "int4"} or QuantizationConfig, optional
///     Quantise the float operands on the way in.
/// out : array, optional
///     Where to write the result: any float type and strides, not overlapping an input.
/// return_lse : bool
///     Also return the logsumexp of each row's scores.
/// context : MfaContext, optional
///     By default one a thread.
///
/// Returns
/// -------
/// output : numpy.ndarray
///     `out`, or a new array of the dtype of `q`, float32 if that is quantised.
/// lse : numpy.ndarray
///     Only with `return_lse`.
///
/// Raises
/// ------
/// MFAError
///     As `umfa.attention`; nothing has been written then.
#[pyfunction]
#[pyo3(signature = (q, k, v, *, mask = None, causal = None, window = None, scale = None, softcap = None, alibi_slopes = None,
                    sinks = None, kv_lengths = None, query_offset = None, dropout_p = None, seed = None, dropout_offset = None,
                    layout = None, quantize = None, out = None, return_lse = None, context = None),
       text_signature = "(q, k, v, *, mask=None, causal=False, window=None, scale=None, softcap=0.0, alibi_slopes=None, sinks=None,                          kv_lengths=None, query_offset=None, dropout_p=0.0, seed=None, dropout_offset=0, layout='bhsd', quantize=None,                          out=None, return_lse=False, context=None)")]
#[allow(clippy::too_many_arguments)] // those of the Python function
pub fn attention<'py>(
    py: Python<'py>,
    q: &Bound<'py, PyAny>,
    k: &Bound<'py, PyAny>,
    v: &Bound<'py, PyAny>,
    mask: Option<&Bound<'py, PyAny>>,
    causal: Option<&Bound<'py, PyAny>>,
    window: Option<&Bound<'py, PyAny>>,
    scale: Option<&Bound<'py, PyAny>>,
    softcap: Option<&Bound<'py, PyAny>>,
    alibi_slopes: Option<&Bound<'py, PyAny>>,
    sinks: Option<&Bound<'py, PyAny>>,
    kv_lengths: Option<&Bound<'py, PyAny>>,
    query_offset: Option<&Bound<'py, PyAny>>,
    dropout_p: Option<&Bound<'py, PyAny>>,
    seed: Option<&Bound<'py, PyAny>>,
    dropout_offset: Option<&Bound<'py, PyAny>>,
    layout: Option<&Bound<'py, PyAny>>,
    quantize: Option<&Bound<'py, PyAny>>,
    out: Option<&Bound<'py, PyAny>>,
    return_lse: Option<&Bound<'py, PyAny>>,
    context: Option<&Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyAny>> {
    let function = "attention";
    let given = Given {
        mask,
        causal,
        window,
        scale,
        softcap,
        alibi_slopes,
        sinks,
        kv_lengths,
        query_offset,
        dropout_p,
        seed,
        dropout_offset,
        quantize,
    };
    let return_lse = return_lse.map_or(Ok(false), |truth| flag(function, "return_lse", truth))?;
    let problem = Problem::new(py, function, [q, k, v], layout, &given, false)?;
    let mut result = match out {
        Some(out) => problem.float_input(function, "out", out)?,
        None => {
            let mut shape = problem.query.shape().to_vec();
            if let (Some(channels), Some(&of_values)) = (shape.last_mut(), problem.value.shape().last()) {
                *channels = of_values;
            }
            empty(function, py, &shape, &problem.query.float_dtype(py))?
        }
    };
    let lse = match return_lse {
        true => Some(empty_named(function, py, &problem.statistics_shape(), problem.statistics_dtype())?),
        false => None,
    };
    {
        let [query, key, value] = problem.views(function)?;
        let options = problem.attention(function)?;
        let output = result.view_mut(function, "out", problem.layout)?;
        // SAFETY: a new array, which nothing else knows.
        let logsumexp = lse.as_ref().map(|lse| unsafe { new_statistics(lse) });
        compute(py, function, context, move |context| match logsumexp {
            Some(logsumexp) => options.forward_with_logsumexp(context, query, key, value, output, logsumexp),
            None => options.forward(context, query, key, value, output),
        })?;
    }
    let output = out.map_or_else(|| result.object.into_any(), Clone::clone);
    match lse {
        Some(lse) => Ok(PyTuple::new(py, [output, lse.object.into_any()])?.into_any()),
        None => Ok(output),
    }
}

/// Gradients of `attention`, given that of its output.
///
/// Parameters
/// ----------
/// grad_out : array
///     Gradient of the output, of its shape; any float type.
/// q, k, v : array or QuantizedTensor
///     What `attention` got.
/// out : array or None
///     What `attention` returned; None: what is needed of it is computed again.
/// lse : array
///     The logsumexp that `attention` returned with ``return_lse=True``.
/// mask, causal, window, scale, softcap, alibi_slopes, sinks, kv_lengths, query_offset, dropout_p, seed, dropout_offset, layout, quantize
///     What `attention` got. `seed` must be given if `dropout_p` is not 0.
/// context : MfaContext, optional
///     By default one a thread.
/// grad_lse : array, optional
///     Gradient of `lse`; 0 by default.
/// gradients : sequence of {"query", "key", "value", "mask", "sinks", "alibi_slopes"}
///     Which gradients to compute.
///
/// Returns
/// -------
/// tuple of numpy.ndarray
///     The gradients in the order asked, each of the shape and dtype of what it belongs to; float32 where that is quantised.
///
/// Raises
/// ------
/// MFAError
///     As `umfa.attention_backward`.
#[pyfunction]
#[pyo3(signature = (grad_out, q, k, v, out, lse, *, mask = None, causal = None, window = None, scale = None, softcap = None,
                    alibi_slopes = None, sinks = None, kv_lengths = None, query_offset = None, dropout_p = None, seed = None,
                    dropout_offset = None, layout = None, quantize = None, context = None, grad_lse = None, gradients = None),
       text_signature = "(grad_out, q, k, v, out, lse, *, mask=None, causal=False, window=None, scale=None, softcap=0.0,                          alibi_slopes=None, sinks=None, kv_lengths=None, query_offset=None, dropout_p=0.0, seed=None,                          dropout_offset=0, layout='bhsd', quantize=None, context=None, grad_lse=None,                          gradients=('query', 'key', 'value'))")]
#[allow(clippy::too_many_arguments)] // those of the Python function
pub fn attention_backward<'py>(
    py: Python<'py>,
    grad_out: &Bound<'py, PyAny>,
    q: &Bound<'py, PyAny>,
    k: &Bound<'py, PyAny>,
    v: &Bound<'py, PyAny>,
    out: Option<&Bound<'py, PyAny>>,
    lse: &Bound<'py, PyAny>,
    mask: Option<&Bound<'py, PyAny>>,
    causal: Option<&Bound<'py, PyAny>>,
    window: Option<&Bound<'py, PyAny>>,
    scale: Option<&Bound<'py, PyAny>>,
    softcap: Option<&Bound<'py, PyAny>>,
    alibi_slopes: Option<&Bound<'py, PyAny>>,
    sinks: Option<&Bound<'py, PyAny>>,
    kv_lengths: Option<&Bound<'py, PyAny>>,
    query_offset: Option<&Bound<'py, PyAny>>,
    dropout_p: Option<&Bound<'py, PyAny>>,
    seed: Option<&Bound<'py, PyAny>>,
    dropout_offset: Option<&Bound<'py, PyAny>>,
    layout: Option<&Bound<'py, PyAny>>,
    quantize: Option<&Bound<'py, PyAny>>,
    context: Option<&Bound<'py, PyAny>>,
    grad_lse: Option<&Bound<'py, PyAny>>,
    gradients: Option<&Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyTuple>> {
    let function = "attention_backward";
    let given = Given {
        mask,
        causal,
        window,
        scale,
        softcap,
        alibi_slopes,
        sinks,
        kv_lengths,
        query_offset,
        dropout_p,
        seed,
        dropout_offset,
        quantize,
    };
    let names = gradient_names(function, gradients)?;
    let problem = Problem::new(py, function, [q, k, v], layout, &given, true)?;
    let grad_output = problem.float_input(function, "grad_out", grad_out)?;
    let output = out.map(|out| problem.float_input(function, "out", out)).transpose()?;
    let lse = problem.given_statistics(function, "lse", lse)?;
    let grad_lse = grad_lse.map(|grad_lse| problem.given_statistics(function, "grad_lse", grad_lse)).transpose()?;
    let results: Vec<Array<'py>> = names.iter().map(|name| new_gradient(py, function, name, &problem)).collect::<PyResult<_>>()?;
    {
        let [query, key, value] = problem.views(function)?;
        let options = problem.attention(function)?;
        let logsumexp = statistics(function, "lse", &lse)?;
        let mut request = Gradients::new(grad_output.view(function, "grad_out", problem.layout)?);
        if let Some(output) = &output {
            request = request.output(output.view(function, "out", problem.layout)?);
        }
        if let Some(grad_lse) = &grad_lse {
            request = request.grad_logsumexp(statistics(function, "grad_lse", grad_lse)?);
        }
        for (name, result) in names.iter().zip(&results) {
            // SAFETY: a new array, which nothing else knows; each gradient has its own.
            let tensor = |view: TensorView<'_>| unsafe {
                TensorViewMut::from_raw_parts(view.precision(), result.data, view.shape(), view.strides())
            };
            // SAFETY: as above.
            let numbers = || unsafe { new_statistics(result) };
            request = match *name {
                "query" => request.query(tensor(result.view(function, name, problem.layout)?)),
                "key" => request.key(tensor(result.view(function, name, problem.layout)?)),
                "value" => request.value(tensor(result.view(function, name, problem.layout)?)),
                "mask" => request.mask(tensor(result.scores_view(function, name, problem.axes())?)),
                "sinks" => request.sinks(numbers()),
                _ => request.alibi_slopes(numbers()),
            };
        }
        compute(py, function, context, move |context| options.backward(context, query, key, value, logsumexp, request))?;
    }
    let results = names.iter().zip(results).map(|(name, result)| {
        let of = match *name {
            "sinks" => sinks,
            "alibi_slopes" => alibi_slopes,
            _ => None,
        };
        like(result, of)
    });
    PyTuple::new(py, results.collect::<PyResult<Vec<_>>>()?)
}

fn gradient_names(function: &str, gradients: Option<&Bound<'_, PyAny>>) -> PyResult<Vec<&'static str>> {
    let Some(gradients) = gradients else {
        return Ok(GRADIENTS[..3].to_vec());
    };
    let expected = "a sequence of names";
    if gradients.is_instance_of::<PyString>() {
        return Err(wrong_type(gradients, function, "gradients", expected));
    }
    let mut names = Vec::new();
    for name in gradients.try_iter().map_err(|_| wrong_type(gradients, function, "gradients", expected))? {
        let name = GRADIENTS[choice(function, "gradients", &name?, &GRADIENTS)?];
        if names.contains(&name) {
            return Err(wrong_value(gradients.py(), function, &format!("gradients: expected each name once, got {name:?} twice")));
        }
        names.push(name);
    }
    Ok(names)
}

/// The array of one gradient.
fn new_gradient<'py>(py: Python<'py>, function: &str, name: &str, problem: &Problem<'py>) -> PyResult<Array<'py>> {
    let missing = |what: &str| wrong_value(py, function, &format!("gradients: expected names of inputs, got {name:?} without {what}"));
    match name {
        "sinks" | "alibi_slopes" => {
            let of = if name == "sinks" { &problem.sinks } else { &problem.alibi_slopes };
            let of = of.as_ref().ok_or_else(|| missing(&format!("{name}=")))?;
            empty_named(function, py, &of.shape, problem.statistics_dtype())
        }
        "mask" => {
            let mask = problem.mask.as_ref().filter(|mask| mask.is_float()).ok_or_else(|| missing("an additive mask="))?;
            empty(function, py, &mask.shape, mask.object.dtype().as_any())
        }
        _ => {
            let operand = match name {
                "query" => &problem.query,
                "key" => &problem.key,
                _ => &problem.value,
            };
            empty(function, py, operand.shape(), &operand.float_dtype(py))
        }
    }
}

/// The gradient of slopes or sinks in the dtype of these, where that is a float type.
fn like<'py>(result: Array<'py>, of: Option<&Bound<'py, PyAny>>) -> PyResult<Bound<'py, PyAny>> {
    let result = result.object.into_any();
    let Some(array) = of.and_then(|of| of.cast::<numpy::PyUntypedArray>().ok()) else {
        return Ok(result);
    };
    let dtype = array.dtype();
    if dtype.kind() == b'f' || is_named(&dtype, "bfloat16")? { result.call_method1("astype", (dtype,)) } else { Ok(result) }
}
