//! Attention: options, forward, backward.

use std::ffi::c_void;
use std::ptr::{from_ref, null, null_mut};

use mfa_sys as sys;

use crate::context::static_text;
use crate::error::{Error, Result, check};
use crate::quantization::{QuantizationConfig, QuantizationScheme};
use crate::statistics::{Statistics, StatisticsMut};
use crate::{MfaContext, Precision, TensorView, TensorViewMut};

/// Where a query row stands among the keys: row `i` stands at key position `i + off`.
///
/// ```
/// // With a cache: the last query stands at the last key.
/// let attention = mfa::Attention::new().causal(mfa::Alignment::LowerRight);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Alignment {
    /// `off` is 0, or what [`Attention::query_offsets`] says.
    #[default]
    UpperLeft,
    /// `off` is the number of keys less that of queries, keys counted by [`Attention::kv_lengths`] where given.
    LowerRight,
}

/// What a kernel is for.
///
/// ```
/// assert_ne!(mfa::Operation::Forward, mfa::Operation::BackwardQuery);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Operation {
    /// Output and logsumexp.
    Forward,
    /// The gradient of the queries.
    BackwardQuery,
    /// The gradients of keys and values.
    BackwardKeyValue,
}

impl Operation {
    fn code(self) -> i32 {
        match self {
            Self::Forward => sys::MFA_OPERATION_FORWARD,
            Self::BackwardQuery => sys::MFA_OPERATION_BACKWARD_QUERY,
            Self::BackwardKeyValue => sys::MFA_OPERATION_BACKWARD_KEY_VALUE,
        }
    }
}

/// Options of scaled dot-product attention, and what computes it.
///
/// Made once, it serves any number of calls. `numerics.md` in the repository has every rule; in short, for query row `i` and key `j`:
///
/// ```text
/// c[i,j] = softmax_scale * dot(query[i], key[j])
/// s[i,j] = softcap > 0 ? softcap * tanh(c / softcap) : c,   + mask (additive),  - alibi_slope * |i + off - j|
/// output[i] = sum_j softmax(s)[i,j] * value[j] over the keys that mask, causality, window and lengths leave; none left: 0
/// ```
///
/// Queries are `[batch, num_heads, seq_len_q, head_dim]`, keys and values `[batch, num_kv_heads, seq_len_kv, …]`: consecutive query heads
/// share a key head, and values may have another head size. Operands may be of any mix of types; the output is of any float type.
///
/// ```
/// use mfa::{Alignment, Attention, MfaContext, TensorView, TensorViewMut};
///
/// let context = MfaContext::new()?;
/// let (query, cache) = (vec![0.1f32; 8 * 4 * 64], vec![0.2f32; 2 * 100 * 64]);
/// let keys = TensorView::new(&cache, [1, 2, 100, 64])?; // two heads, each shared by four query heads
/// let mut output = vec![0.0f32; 8 * 4 * 64];
/// Attention::new().causal(Alignment::LowerRight).window(Some(63), None).forward(
///     &context,
///     TensorView::new(&query, [1, 8, 4, 64])?,
///     keys,
///     keys,
///     TensorViewMut::new(&mut output, [1, 8, 4, 64])?,
/// )?;
/// assert!((output[0] - 0.2).abs() < 1e-6);
/// # mfa::Result::Ok(())
/// ```
#[derive(Debug, Clone, Default)]
#[must_use]
pub struct Attention<'a> {
    causal: bool,
    alignment: Alignment,
    softmax_scale: Option<f64>,
    softcap: f64,
    mask: Option<TensorView<'a>>,
    window: (Option<u64>, Option<u64>),
    query_offsets: Option<&'a [i64]>,
    kv_lengths: Option<&'a [i64]>,
    alibi_slopes: Option<Statistics<'a>>,
    sinks: Option<Statistics<'a>>,
    dropout_p: f64,
    seed: u64,
    dropout_offset: u32,
    quantize: QuantizationConfig,
}

impl<'a> Attention<'a> {
    /// Every query attends every key; scores are multiplied by 1 / sqrt(head_dim).
    ///
    /// ```
    /// let attention = mfa::Attention::new();
    /// ```
    pub fn new() -> Self {
        Self::default()
    }

    /// Row `i` attends keys `j <= i + off`, and where `off` comes from.
    ///
    /// ```
    /// let attention = mfa::Attention::new().causal(mfa::Alignment::UpperLeft);
    /// ```
    pub fn causal(mut self, alignment: Alignment) -> Self {
        self.causal = true;
        self.alignment = alignment;
        self
    }

    /// Where `off` comes from without [`Attention::causal`]: for a window, or for slopes.
    ///
    /// ```
    /// let attention = mfa::Attention::new().alignment(mfa::Alignment::LowerRight).window(Some(127), Some(0));
    /// ```
    pub fn alignment(mut self, alignment: Alignment) -> Self {
        self.alignment = alignment;
        self
    }

    /// The factor of the scores: any finite number. By default 1 / sqrt(head_dim).
    ///
    /// ```
    /// let attention = mfa::Attention::new().softmax_scale(0.125);
    /// ```
    pub fn softmax_scale(mut self, softmax_scale: f64) -> Self {
        self.softmax_scale = Some(softmax_scale);
        self
    }

    /// Scores `c` become `softcap * tanh(c / softcap)`; 0: they stay as they are.
    ///
    /// ```
    /// let attention = mfa::Attention::new().softcap(50.0);
    /// ```
    pub fn softcap(mut self, softcap: f64) -> Self {
        self.softcap = softcap;
        self
    }

    /// A mask whose shape broadcasts to `[batch, num_heads, seq_len_q, seq_len_kv]` by sizes of 1: `bool`, true = attend, or a float type,
    /// added to the scores.
    ///
    /// ```
    /// let bias = [0.0f32, -1.0, -2.0];
    /// let attention = mfa::Attention::new().mask(mfa::TensorView::new(&bias, [1, 1, 1, 3])?);
    /// # mfa::Result::Ok(())
    /// ```
    pub fn mask(mut self, mask: TensorView<'a>) -> Self {
        self.mask = Some(mask);
        self
    }

    /// Row `i` attends keys from `i + off - left` to `i + off + right`; None: no limit on that side.
    ///
    /// ```
    /// let attention = mfa::Attention::new().causal(mfa::Alignment::UpperLeft).window(Some(4095), None);
    /// ```
    pub fn window(mut self, left: Option<u64>, right: Option<u64>) -> Self {
        self.window = (left, right);
        self
    }

    /// `off` itself: one number, or one for each sequence of the batch. Not together with [`Alignment::LowerRight`].
    ///
    /// ```
    /// let attention = mfa::Attention::new().causal(mfa::Alignment::UpperLeft).query_offsets(&[1000]);
    /// ```
    pub fn query_offsets(mut self, query_offsets: &'a [i64]) -> Self {
        self.query_offsets = Some(query_offsets);
        self
    }

    /// How many keys each sequence of the batch has; those beyond are never read.
    ///
    /// ```
    /// let attention = mfa::Attention::new().kv_lengths(&[100, 37]);
    /// ```
    pub fn kv_lengths(mut self, kv_lengths: &'a [i64]) -> Self {
        self.kv_lengths = Some(kv_lengths);
        self
    }

    /// A slope for each query head: `slope * |i + off - j|` is subtracted from the scores.
    ///
    /// ```
    /// let attention = mfa::Attention::new().alibi_slopes(&[0.5f32, 0.25]);
    /// ```
    pub fn alibi_slopes(mut self, alibi_slopes: impl Into<Statistics<'a>>) -> Self {
        self.alibi_slopes = Some(alibi_slopes.into());
        self
    }

    /// For each query head a score that takes part in the softmax's sum and has no value.
    ///
    /// ```
    /// let attention = mfa::Attention::new().sinks(&[0.0f32, 1.0]);
    /// ```
    pub fn sinks(mut self, sinks: impl Into<Statistics<'a>>) -> Self {
        self.sinks = Some(sinks.into());
        self
    }

    /// Drops weights with this probability and divides the others by 1 - `probability`. `seed` and `offset` determine which; backward
    /// needs those of forward.
    ///
    /// ```
    /// let attention = mfa::Attention::new().dropout(0.1, 42, 0);
    /// ```
    pub fn dropout(mut self, probability: f64, seed: u64, offset: u32) -> Self {
        self.dropout_p = probability;
        self.seed = seed;
        self.dropout_offset = offset;
        self
    }

    /// Quantises float operands on the way in.
    ///
    /// With smoothing, which the named schemes do, or scales per tensor, head or channel, a causal result depends on later tokens, within
    /// the quantisation error.
    ///
    /// ```
    /// let attention = mfa::Attention::new().quantize(mfa::QuantizationConfig::int8());
    /// ```
    pub fn quantize(mut self, quantize: QuantizationConfig) -> Self {
        self.quantize = quantize;
        self
    }

    /// Computes the output, of shape `[batch, num_heads, seq_len_q, head_dim_v]` and any float type.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidDimensions`] for shapes that do not match, [`Error::InvalidArgument`] for values that are not allowed and for an
    /// output whose elements may coincide, [`Error::Unsupported`] for what the device does not serve, [`Error::AllocationFailed`]. Nothing
    /// has been written then.
    ///
    /// ```
    /// use mfa::{Attention, MfaContext, TensorView, TensorViewMut};
    ///
    /// let (operand, mut output) = ([half::f16::ONE; 64], [half::f16::ZERO; 64]);
    /// let view = TensorView::new(&operand, [1, 1, 4, 16])?;
    /// Attention::new().forward(&MfaContext::new()?, view, view, view, TensorViewMut::new(&mut output, [1, 1, 4, 16])?)?;
    /// assert_eq!(output, operand);
    /// # mfa::Result::Ok(())
    /// ```
    pub fn forward(
        &self,
        context: &MfaContext,
        query: TensorView<'_>,
        key: TensorView<'_>,
        value: TensorView<'_>,
        output: TensorViewMut<'_>,
    ) -> Result<()> {
        self.run("Attention::forward", [&query, &key, &value], Some(&output.as_view()), null_mut(), |problem| {
            // SAFETY: `run` made the problem of views that live during this call, the output's exclusively.
            check(Some(context), unsafe { sys::mfa_attention_run_forward(context.handle(), problem) })
        })
    }

    /// Also computes the logsumexp of each row's scores, `[batch, num_heads, seq_len_q]`, which backward needs: natural logarithm, -inf for
    /// a row without keys.
    ///
    /// # Errors
    ///
    /// As [`Attention::forward`].
    ///
    /// ```
    /// use mfa::{Attention, MfaContext, TensorView, TensorViewMut};
    ///
    /// let (operand, mut output, mut logsumexp) = ([0.0f32; 64], [0.0f32; 64], [0.0f32; 4]);
    /// let view = TensorView::new(&operand, [1, 1, 4, 16])?;
    /// let output = TensorViewMut::new(&mut output, [1, 1, 4, 16])?;
    /// Attention::new().forward_with_logsumexp(&MfaContext::new()?, view, view, view, output, &mut logsumexp)?;
    /// assert!((logsumexp[0] - 4.0f32.ln()).abs() < 1e-6);
    /// # mfa::Result::Ok(())
    /// ```
    pub fn forward_with_logsumexp<'o>(
        &self,
        context: &MfaContext,
        query: TensorView<'_>,
        key: TensorView<'_>,
        value: TensorView<'_>,
        output: TensorViewMut<'_>,
        logsumexp: impl Into<StatisticsMut<'o>>,
    ) -> Result<()> {
        const FUNCTION: &str = "Attention::forward_with_logsumexp";
        let operands = [&query, &key, &value];
        let logsumexp = logsumexp.into().pointer(FUNCTION, "logsumexp", is_double(operands), rows_of(&query))?;
        self.run(FUNCTION, operands, Some(&output.as_view()), logsumexp, |problem| {
            // SAFETY: as in `forward`; the logsumexp has an element for each row, of the type of statistics.
            check(Some(context), unsafe { sys::mfa_attention_run_forward(context.handle(), problem) })
        })
    }

    /// Computes the gradients that `gradients` asks for, given the logsumexp that [`Attention::forward_with_logsumexp`] wrote with the same
    /// options and operands.
    ///
    /// Gradients of quantised operands are with respect to the real values that the codes stand for (straight-through).
    ///
    /// # Errors
    ///
    /// As [`Attention::forward`].
    ///
    /// ```
    /// use mfa::{Attention, Gradients, MfaContext, TensorView, TensorViewMut};
    ///
    /// let context = MfaContext::new()?;
    /// let shape = [1, 1, 4, 16];
    /// let (operand, mut output, mut logsumexp) = ([0.5f32; 64], [0.0f32; 64], [0.0f32; 4]);
    /// let view = TensorView::new(&operand, shape)?;
    /// let attention = Attention::new();
    /// let result = TensorViewMut::new(&mut output, shape)?;
    /// attention.forward_with_logsumexp(&context, view, view, view, result, &mut logsumexp)?;
    ///
    /// let (grad_output, mut grad_value) = ([1.0f32; 64], [0.0f32; 64]);
    /// let gradients = Gradients::new(TensorView::new(&grad_output, shape)?)
    ///     .output(TensorView::new(&output, shape)?)
    ///     .value(TensorViewMut::new(&mut grad_value, shape)?);
    /// attention.backward(&context, view, view, view, &logsumexp, gradients)?;
    /// assert!((grad_value[0] - 1.0).abs() < 1e-6);
    /// # mfa::Result::Ok(())
    /// ```
    pub fn backward<'s>(
        &self,
        context: &MfaContext,
        query: TensorView<'_>,
        key: TensorView<'_>,
        value: TensorView<'_>,
        logsumexp: impl Into<Statistics<'s>>,
        mut gradients: Gradients<'_>,
    ) -> Result<()> {
        const FUNCTION: &str = "Attention::backward";
        let operands = [&query, &key, &value];
        let (double, rows) = (is_double(operands), rows_of(&query));
        let logsumexp = logsumexp.into().pointer(FUNCTION, "logsumexp", double, rows)?;
        let output = gradients.output;
        let structures = GradientStructures::new(&gradients);
        let request = gradients.request(FUNCTION, &structures, double, rows, query.shape()[1])?;
        self.run(FUNCTION, operands, output.as_ref(), logsumexp.cast_mut(), |problem| {
            // SAFETY: as in `forward`; in backward the library reads output and logsumexp, and writes what `gradients` borrows exclusively.
            check(Some(context), unsafe { sys::mfa_attention_run_backward(context.handle(), problem, &request) })
        })
    }

    /// The bytes of workspace that [`Attention::forward`] would hold during its call.
    ///
    /// # Errors
    ///
    /// As [`Attention::forward`].
    ///
    /// ```
    /// use mfa::{Attention, MfaContext, TensorView, TensorViewMut};
    ///
    /// let (operand, mut output) = ([0.0f32; 64], [0.0f32; 64]);
    /// let view = TensorView::new(&operand, [1, 1, 4, 16])?;
    /// let output = TensorViewMut::new(&mut output, [1, 1, 4, 16])?;
    /// println!("{} bytes", Attention::new().workspace_size(&MfaContext::new()?, view, view, view, output.as_view())?);
    /// # mfa::Result::Ok(())
    /// ```
    pub fn workspace_size(
        &self,
        context: &MfaContext,
        query: TensorView<'_>,
        key: TensorView<'_>,
        value: TensorView<'_>,
        output: TensorView<'_>,
    ) -> Result<u64> {
        let mut size = 0;
        self.run("Attention::workspace_size", [&query, &key, &value], Some(&output), null_mut(), |problem| {
            // SAFETY: as in `forward`; nothing but the size is written.
            check(Some(context), unsafe { sys::mfa_attention_workspace_size(context.handle(), problem, null(), &mut size) })
        })?;
        Ok(size)
    }

    /// The name of the kernel that would compute this, such as `"attention_forward_float_avx2"`.
    ///
    /// # Errors
    ///
    /// As [`Attention::forward`].
    ///
    /// ```
    /// use mfa::{Attention, MfaContext, Operation, TensorView, TensorViewMut};
    ///
    /// let (operand, mut output) = ([0.0f32; 64], [0.0f32; 64]);
    /// let view = TensorView::new(&operand, [1, 1, 4, 16])?;
    /// let output = TensorViewMut::new(&mut output, [1, 1, 4, 16])?;
    /// let name = Attention::new().kernel_name(&MfaContext::new()?, Operation::Forward, view, view, view, output.as_view())?;
    /// assert!(name.starts_with("attention_"));
    /// # mfa::Result::Ok(())
    /// ```
    pub fn kernel_name(
        &self,
        context: &MfaContext,
        operation: Operation,
        query: TensorView<'_>,
        key: TensorView<'_>,
        value: TensorView<'_>,
        output: TensorView<'_>,
    ) -> Result<&'static str> {
        let mut name = null();
        self.run("Attention::kernel_name", [&query, &key, &value], Some(&output), null_mut(), |problem| {
            // SAFETY: as in `forward`; nothing but the name's address is written.
            check(Some(context), unsafe { sys::mfa_attention_kernel_name(context.handle(), problem, operation.code(), &mut name) })
        })?;
        // SAFETY: names of kernels are static.
        Ok(unsafe { static_text(name) })
    }

    /// Describes the problem in the C interface's structures, which live during the call of `call`.
    fn run<R>(
        &self,
        function: &str,
        operands: [&TensorView<'_>; 3],
        output: Option<&TensorView<'_>>,
        logsumexp: *mut c_void,
        call: impl FnOnce(&sys::mfa_attention_t) -> Result<R>,
    ) -> Result<R> {
        let [query, key, _] = operands;
        let [batch, num_heads, _, head_dim] = query.shape();
        let double = is_double(operands);

        let quantizations = operands.map(|operand| operand.quantization.map(|quantization| quantization.structure()));
        let mut tensors = operands.map(|operand| operand.raw.structure());
        for (tensor, quantization) in tensors.iter_mut().zip(&quantizations) {
            tensor.quantization = quantization.as_ref().map_or(null(), from_ref);
        }
        let output = output.map(|output| output.raw.structure());
        let mask = self.mask.map(|mask| mask.raw.structure());
        let mut schemes = [None; 3];
        if self.quantize != QuantizationConfig::default() {
            schemes = self.quantize.schemes(rotation(query, key)).map(|scheme| scheme.as_ref().map(QuantizationScheme::structure));
        }
        let scheme = |index: usize| {
            let scheme = schemes[index].as_ref().filter(|_| operands[index].precision().is_float());
            scheme.map_or(null(), from_ref)
        };
        if let Some(lengths) = self.kv_lengths.filter(|lengths| lengths.len() != batch) {
            return Err(Error::InvalidDimensions(format!(
                "mfa::{function}: kv_lengths: expected {batch} numbers, one a sequence, got {}",
                lengths.len()
            )));
        }
        let vector = |argument: &str, numbers: &Option<Statistics<'_>>| {
            numbers.map_or(Ok(null()), |numbers| numbers.pointer(function, argument, double, Some(num_heads)))
        };
        // Beyond the largest number there is no key, so that it is no limit.
        let side = |limit: Option<u64>| limit.map_or(-1, |limit| i64::try_from(limit).unwrap_or(i64::MAX));
        let problem = sys::mfa_attention_t {
            struct_size: size_of::<sys::mfa_attention_t>() as u32,
            causal: self.causal.into(),
            softmax_scale: self.softmax_scale.unwrap_or(1.0 / (head_dim.max(1) as f64).sqrt()),
            softcap: self.softcap,
            query: &tensors[0],
            key: &tensors[1],
            value: &tensors[2],
            output: output.as_ref().map_or(null(), from_ref),
            logsumexp,
            mask: mask.as_ref().map_or(null(), from_ref),
            alignment: match self.alignment {
                Alignment::UpperLeft => sys::MFA_ALIGNMENT_UPPER_LEFT,
                Alignment::LowerRight => sys::MFA_ALIGNMENT_LOWER_RIGHT,
            },
            num_query_offsets: self.query_offsets.map_or(0, |offsets| u32::try_from(offsets.len()).unwrap_or(u32::MAX)),
            query_offsets: self.query_offsets.map_or(null(), <[i64]>::as_ptr),
            window_left: side(self.window.0),
            window_right: side(self.window.1),
            kv_lengths: self.kv_lengths.map_or(null(), <[i64]>::as_ptr),
            alibi_slopes: vector("alibi_slopes", &self.alibi_slopes)?,
            sinks: vector("sinks", &self.sinks)?,
            dropout_p: self.dropout_p,
            seed: self.seed,
            dropout_offset: self.dropout_offset,
            reserved: 0,
            quantize_query: scheme(0),
            quantize_key: scheme(1),
            quantize_value: scheme(2),
        };
        call(&problem)
    }
}

/// Whether statistics are `f64`.
fn is_double(operands: [&TensorView<'_>; 3]) -> bool {
    operands.iter().any(|operand| operand.precision() == Precision::Fp64)
}

/// The number of query rows, each with a logsumexp.
fn rows_of(query: &TensorView<'_>) -> Option<usize> {
    let [batch, heads, tokens, _] = query.shape();
    batch.checked_mul(heads)?.checked_mul(tokens)
}

/// Whether the one of query and key that comes quantised is rotated; None if neither does.
fn rotation(query: &TensorView<'_>, key: &TensorView<'_>) -> Option<bool> {
    let quantized = [query, key].into_iter().find(|operand| !operand.precision().is_float())?;
    Some(quantized.quantization.is_some_and(|quantization| quantization.is_rotated()))
}

/// Which gradients backward computes, and where it writes them.
///
/// Each has the shape of its tensor and any float type. What is not asked for is not computed.
///
/// ```
/// use mfa::{Gradients, TensorView, TensorViewMut};
///
/// let (grad_output, mut grad_query, mut grad_sinks) = ([1.0f32; 64], [0.0f32; 64], [0.0f32; 2]);
/// let gradients = Gradients::new(TensorView::new(&grad_output, [1, 2, 2, 16])?)
///     .query(TensorViewMut::new(&mut grad_query, [1, 2, 2, 16])?)
///     .sinks(&mut grad_sinks);
/// # mfa::Result::Ok(())
/// ```
#[derive(Debug)]
#[must_use]
pub struct Gradients<'a> {
    grad_output: TensorView<'a>,
    output: Option<TensorView<'a>>,
    grad_logsumexp: Option<Statistics<'a>>,
    query: Option<TensorViewMut<'a>>,
    key: Option<TensorViewMut<'a>>,
    value: Option<TensorViewMut<'a>>,
    mask: Option<TensorViewMut<'a>>,
    sinks: Option<StatisticsMut<'a>>,
    alibi_slopes: Option<StatisticsMut<'a>>,
}

impl<'a> Gradients<'a> {
    /// Given the gradient of the output.
    ///
    /// ```
    /// let gradients = mfa::Gradients::new(mfa::TensorView::new(&[1.0f32; 64], [1, 1, 4, 16])?);
    /// # mfa::Result::Ok(())
    /// ```
    pub fn new(grad_output: TensorView<'a>) -> Self {
        Self {
            grad_output,
            output: None,
            grad_logsumexp: None,
            query: None,
            key: None,
            value: None,
            mask: None,
            sinks: None,
            alibi_slopes: None,
        }
    }

    /// The output that forward wrote. Without it, what is needed of it is computed again.
    ///
    /// ```
    /// let (grad_output, output) = ([1.0f32; 64], [0.0f32; 64]);
    /// let gradients = mfa::Gradients::new(mfa::TensorView::new(&grad_output, [1, 1, 4, 16])?)
    ///     .output(mfa::TensorView::new(&output, [1, 1, 4, 16])?);
    /// # mfa::Result::Ok(())
    /// ```
    pub fn output(mut self, output: TensorView<'a>) -> Self {
        self.output = Some(output);
        self
    }

    /// A gradient of the logsumexp, where the loss depends on that too; 0 by default.
    ///
    /// ```
    /// let gradients = mfa::Gradients::new(mfa::TensorView::new(&[1.0f32; 64], [1, 1, 4, 16])?).grad_logsumexp(&[0.5f32; 4]);
    /// # mfa::Result::Ok(())
    /// ```
    pub fn grad_logsumexp(mut self, grad_logsumexp: impl Into<Statistics<'a>>) -> Self {
        self.grad_logsumexp = Some(grad_logsumexp.into());
        self
    }

    /// Where to write the gradient of the queries.
    ///
    /// ```
    /// let mut grad_query = [0.0f32; 64];
    /// let gradients = mfa::Gradients::new(mfa::TensorView::new(&[1.0f32; 64], [1, 1, 4, 16])?)
    ///     .query(mfa::TensorViewMut::new(&mut grad_query, [1, 1, 4, 16])?);
    /// # mfa::Result::Ok(())
    /// ```
    pub fn query(mut self, grad_query: TensorViewMut<'a>) -> Self {
        self.query = Some(grad_query);
        self
    }

    /// Where to write the gradient of the keys.
    ///
    /// ```
    /// let mut grad_key = [0.0f32; 64];
    /// let gradients = mfa::Gradients::new(mfa::TensorView::new(&[1.0f32; 64], [1, 1, 4, 16])?)
    ///     .key(mfa::TensorViewMut::new(&mut grad_key, [1, 1, 4, 16])?);
    /// # mfa::Result::Ok(())
    /// ```
    pub fn key(mut self, grad_key: TensorViewMut<'a>) -> Self {
        self.key = Some(grad_key);
        self
    }

    /// Where to write the gradient of the values.
    ///
    /// ```
    /// let mut grad_value = [0.0f32; 64];
    /// let gradients = mfa::Gradients::new(mfa::TensorView::new(&[1.0f32; 64], [1, 1, 4, 16])?)
    ///     .value(mfa::TensorViewMut::new(&mut grad_value, [1, 1, 4, 16])?);
    /// # mfa::Result::Ok(())
    /// ```
    pub fn value(mut self, grad_value: TensorViewMut<'a>) -> Self {
        self.value = Some(grad_value);
        self
    }

    /// Where to write the gradient of an additive mask, of the mask's own shape: summed over the axes along which it broadcasts.
    ///
    /// ```
    /// let mut grad_mask = [0.0f32; 4];
    /// let gradients = mfa::Gradients::new(mfa::TensorView::new(&[1.0f32; 64], [1, 1, 4, 16])?)
    ///     .mask(mfa::TensorViewMut::new(&mut grad_mask, [1, 1, 1, 4])?);
    /// # mfa::Result::Ok(())
    /// ```
    pub fn mask(mut self, grad_mask: TensorViewMut<'a>) -> Self {
        self.mask = Some(grad_mask);
        self
    }

    /// Where to write the gradient of the sinks, `[num_heads]`.
    ///
    /// ```
    /// let mut grad_sinks = [0.0f32];
    /// let gradients = mfa::Gradients::new(mfa::TensorView::new(&[1.0f32; 64], [1, 1, 4, 16])?).sinks(&mut grad_sinks);
    /// # mfa::Result::Ok(())
    /// ```
    pub fn sinks(mut self, grad_sinks: impl Into<StatisticsMut<'a>>) -> Self {
        self.sinks = Some(grad_sinks.into());
        self
    }

    /// Where to write the gradient of the slopes, `[num_heads]`.
    ///
    /// ```
    /// let mut grad_slopes = [0.0f32];
    /// let gradients = mfa::Gradients::new(mfa::TensorView::new(&[1.0f32; 64], [1, 1, 4, 16])?).alibi_slopes(&mut grad_slopes);
    /// # mfa::Result::Ok(())
    /// ```
    pub fn alibi_slopes(mut self, grad_alibi_slopes: impl Into<StatisticsMut<'a>>) -> Self {
        self.alibi_slopes = Some(grad_alibi_slopes.into());
        self
    }

    fn request(
        &mut self,
        function: &str,
        structures: &GradientStructures,
        double: bool,
        rows: Option<usize>,
        num_heads: usize,
    ) -> Result<sys::mfa_attention_gradients_t> {
        let grad_logsumexp = match &self.grad_logsumexp {
            Some(numbers) => numbers.pointer(function, "grad_logsumexp", double, rows)?,
            None => null(),
        };
        let vector = |argument: &str, numbers: &mut Option<StatisticsMut<'_>>| {
            numbers.as_mut().map_or(Ok(null_mut()), |numbers| numbers.pointer(function, argument, double, Some(num_heads)))
        };
        let pointer = |tensor: &Option<sys::mfa_tensor_t>| tensor.as_ref().map_or(null(), from_ref);
        Ok(sys::mfa_attention_gradients_t {
            struct_size: size_of::<sys::mfa_attention_gradients_t>() as u32,
            d_values_given: 0,
            grad_output: &structures.grad_output,
            grad_logsumexp,
            d_values: null_mut(),
            grad_query: pointer(&structures.query),
            grad_key: pointer(&structures.key),
            grad_value: pointer(&structures.value),
            grad_mask: pointer(&structures.mask),
            grad_sinks: vector("grad_sinks", &mut self.sinks)?,
            grad_alibi_slopes: vector("grad_alibi_slopes", &mut self.alibi_slopes)?,
        })
    }
}

/// The tensors of [`Gradients`] as the C interface takes them.
struct GradientStructures {
    grad_output: sys::mfa_tensor_t,
    query: Option<sys::mfa_tensor_t>,
    key: Option<sys::mfa_tensor_t>,
    value: Option<sys::mfa_tensor_t>,
    mask: Option<sys::mfa_tensor_t>,
}

impl GradientStructures {
    fn new(gradients: &Gradients<'_>) -> Self {
        let structure = |view: &Option<TensorViewMut<'_>>| view.as_ref().map(|view| view.raw.structure());
        Self {
            grad_output: gradients.grad_output.raw.structure(),
            query: structure(&gradients.query),
            key: structure(&gradients.key),
            value: structure(&gradients.value),
            mask: structure(&gradients.mask),
        }
    }
}

/// The result of attention over a part of the keys.
///
/// ```
/// let (output, logsumexp) = ([0.0f32; 64], [0.0f32; 4]);
/// let part = mfa::Partial { output: mfa::TensorView::new(&output, [1, 1, 4, 16])?, logsumexp: (&logsumexp).into() };
/// # mfa::Result::Ok(())
/// ```
#[derive(Debug, Clone, Copy)]
pub struct Partial<'a> {
    /// What [`Attention::forward_with_logsumexp`] wrote.
    pub output: TensorView<'a>,
    /// Its logsumexp.
    pub logsumexp: Statistics<'a>,
}

/// Merges the results of attention of the same queries over two disjoint parts of the keys into that over all of them.
///
/// A part that begins at key `n` of the whole takes query offsets smaller by `n`. Sinks belong to one part only. A row whose logsumexp is
/// -inf in a part is absent there.
///
/// # Errors
///
/// [`Error::InvalidDimensions`] for shapes that differ, [`Error::InvalidArgument`] for statistics of two types, and the others of
/// [`Attention::forward`].
///
/// ```
/// use mfa::{Attention, MfaContext, Partial, TensorView, TensorViewMut};
///
/// let context = MfaContext::new()?;
/// let (shape, half) = ([1, 1, 4, 16], [1, 1, 2, 16]);
/// let elements: Vec<f32> = (0..64).map(|index| index as f32 / 64.0).collect();
/// let query = TensorView::new(&elements, shape)?;
/// let (mut outputs, mut logsumexps) = ([[0.0f32; 64]; 3], [[0.0f32; 4]; 3]);
/// for part in 0..2 {
///     let keys = TensorView::new(&elements[32 * part..][..32], half)?;
///     let output = TensorViewMut::new(&mut outputs[part], shape)?;
///     Attention::new().forward_with_logsumexp(&context, query, keys, keys, output, &mut logsumexps[part])?;
/// }
/// let ([first, second, merged], [first_lse, second_lse, merged_lse]) = (&mut outputs, &mut logsumexps);
/// mfa::merge(
///     &context,
///     Partial { output: TensorView::new(first, shape)?, logsumexp: (&*first_lse).into() },
///     Partial { output: TensorView::new(second, shape)?, logsumexp: (&*second_lse).into() },
///     TensorViewMut::new(merged, shape)?,
///     merged_lse,
/// )?;
/// let mut whole = [0.0f32; 64];
/// Attention::new().forward(&context, query, query, query, TensorViewMut::new(&mut whole, shape)?)?;
/// assert!(whole.iter().zip(merged.iter()).all(|(whole, merged)| (whole - merged).abs() < 1e-6));
/// # mfa::Result::Ok(())
/// ```
pub fn merge<'o>(
    context: &MfaContext,
    first: Partial<'_>,
    second: Partial<'_>,
    output: TensorViewMut<'_>,
    logsumexp: impl Into<StatisticsMut<'o>>,
) -> Result<()> {
    const FUNCTION: &str = "merge";
    let rows = rows_of(&output.as_view());
    let mut logsumexp = logsumexp.into();
    let double = matches!(logsumexp, StatisticsMut::Fp64(_));
    let precision = if double { Precision::Fp64 } else { Precision::Fp32 };
    let first_logsumexp = first.logsumexp.pointer(FUNCTION, "first.logsumexp", double, rows)?;
    let second_logsumexp = second.logsumexp.pointer(FUNCTION, "second.logsumexp", double, rows)?;
    let logsumexp = logsumexp.pointer(FUNCTION, "logsumexp", double, rows)?;
    let (first, second, output) = (first.output.raw.structure(), second.output.raw.structure(), output.raw.structure());
    // SAFETY: the structures describe memory that lives during the call; the statistics have an element for each row of the output, whose
    // shape the library compares with the others. Output and logsumexp are borrowed exclusively.
    let status = unsafe {
        sys::mfa_attention_merge(context.handle(), &first, first_logsumexp, &second, second_logsumexp, &output, logsumexp, precision.code())
    };
    check(Some(context), status)
}
