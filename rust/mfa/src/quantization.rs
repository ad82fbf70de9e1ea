//! Quantisation: codes with scales, and how to make them.

use std::num::NonZeroU32;

use mfa_sys as sys;

use crate::error::{Error, Result, check};
use crate::tensor::RawTensor;
use crate::{Int4Pair, MfaContext, Precision, TensorView, TensorViewMut};

/// Which elements share a scale. B, H, S and D are batch, heads, tokens and channels; the scales lie in this order whatever the layout of
/// the codes.
///
/// ```
/// let granularity = mfa::Granularity::group(32)?;
/// assert_eq!(granularity.scales([1, 2, 10, 64]), Some(1 * 2 * 10 * 2));
/// # mfa::Result::Ok(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Granularity {
    /// One scale for all.
    Tensor,
    /// `[B, H]`
    Head,
    /// `[B, H, S]`, the default.
    #[default]
    Token,
    /// `[B, H, ceil(S / size)]`: so many tokens.
    Block(NonZeroU32),
    /// `[B, H, D]`
    Channel,
    /// `[B, H, S, ceil(D / size)]`: so many channels of a token.
    Group(NonZeroU32),
}

impl Granularity {
    /// Blocks of so many tokens.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidArgument`] for 0.
    ///
    /// ```
    /// assert!(mfa::Granularity::block(0).is_err());
    /// ```
    pub fn block(size: u32) -> Result<Self> {
        NonZeroU32::new(size).map(Self::Block).ok_or_else(|| empty("block"))
    }

    /// Groups of so many channels.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidArgument`] for 0.
    ///
    /// ```
    /// assert!(mfa::Granularity::group(32).is_ok());
    /// ```
    pub fn group(size: u32) -> Result<Self> {
        NonZeroU32::new(size).map(Self::Group).ok_or_else(|| empty("group"))
    }

    /// How many scales a tensor of this shape has; None if there are too many for any memory.
    ///
    /// ```
    /// assert_eq!(mfa::Granularity::Token.scales([2, 8, 100, 64]), Some(1600));
    /// ```
    pub fn scales(self, shape: [usize; 4]) -> Option<usize> {
        let [batch, heads, tokens, channels] = shape;
        let sizes = match self {
            Self::Tensor => [1, 1, 1, 1],
            Self::Head => [batch, heads, 1, 1],
            Self::Token => [batch, heads, tokens, 1],
            Self::Block(size) => [batch, heads, tokens.div_ceil(size.get() as usize), 1],
            Self::Channel => [batch, heads, 1, channels],
            Self::Group(size) => [batch, heads, tokens, channels.div_ceil(size.get() as usize)],
        };
        sizes.iter().try_fold(1usize, |product, &size| product.checked_mul(size))
    }

    fn code(self) -> i32 {
        match self {
            Self::Tensor => sys::MFA_GRANULARITY_TENSOR,
            Self::Head => sys::MFA_GRANULARITY_HEAD,
            Self::Token => sys::MFA_GRANULARITY_TOKEN,
            Self::Block(_) => sys::MFA_GRANULARITY_BLOCK,
            Self::Channel => sys::MFA_GRANULARITY_CHANNEL,
            Self::Group(_) => sys::MFA_GRANULARITY_GROUP,
        }
    }

    fn block_size(self) -> u32 {
        if let Self::Block(size) = self { size.get() } else { 0 }
    }

    fn group_size(self) -> u32 {
        if let Self::Group(size) = self { size.get() } else { 0 }
    }
}

#[cold]
fn empty(kind: &str) -> Error {
    Error::InvalidArgument(format!("mfa::Granularity::{kind}: size: expected at least 1, got 0"))
}

/// What the codes of an INT8 or INT4 tensor stand for: `scale * (code - zero_point)`, plus the channel's mean if there are means, with the
/// rotation undone if the codes are rotated.
///
/// ```
/// use mfa::{Granularity, Quantization, TensorView};
///
/// let (codes, scales, zero_points) = ([10i8; 6], [0.5f32; 2], [4i32; 2]);
/// let quantization = Quantization::new(Granularity::Token, &scales).zero_points(&zero_points);
/// let threes = TensorView::new(&codes, [1, 1, 2, 3])?.quantized(quantization)?;
/// # mfa::Result::Ok(())
/// ```
#[derive(Debug, Clone, Copy)]
pub struct Quantization<'a> {
    granularity: Granularity,
    scales: &'a [f32],
    zero_points: Option<&'a [i32]>,
    channel_means: Option<&'a [f32]>,
    rotated: bool,
}

impl<'a> Quantization<'a> {
    /// Symmetric codes with scales in the order that the granularity says.
    ///
    /// ```
    /// let quantization = mfa::Quantization::new(mfa::Granularity::Tensor, &[0.1]);
    /// ```
    pub fn new(granularity: Granularity, scales: &'a [f32]) -> Self {
        Self { granularity, scales, zero_points: None, channel_means: None, rotated: false }
    }

    /// With a zero point for each scale.
    ///
    /// ```
    /// let quantization = mfa::Quantization::new(mfa::Granularity::Tensor, &[0.1]).zero_points(&[3]);
    /// ```
    pub fn zero_points(mut self, zero_points: &'a [i32]) -> Self {
        self.zero_points = Some(zero_points);
        self
    }

    /// With means, `[batch, heads, channels]`, that are added to every token of a head: smoothed keys.
    ///
    /// ```
    /// let quantization = mfa::Quantization::new(mfa::Granularity::Tensor, &[0.1]).channel_means(&[0.0; 64]);
    /// ```
    pub fn channel_means(mut self, channel_means: &'a [f32]) -> Self {
        self.channel_means = Some(channel_means);
        self
    }

    /// Whether the codes are those of the Walsh-Hadamard transform of each row.
    ///
    /// ```
    /// let quantization = mfa::Quantization::new(mfa::Granularity::Tensor, &[0.1]).rotated(true);
    /// ```
    pub fn rotated(mut self, rotated: bool) -> Self {
        self.rotated = rotated;
        self
    }

    pub(crate) fn is_rotated(&self) -> bool {
        self.rotated
    }

    pub(crate) fn check(&self, shape: [usize; 4]) -> Result<()> {
        let expected = self.granularity.scales(shape);
        part("scales", Some(self.scales.len()), expected, shape)?;
        part("zero_points", self.zero_points.map(<[i32]>::len), expected, shape)?;
        part("channel_means", self.channel_means.map(<[f32]>::len), Granularity::Channel.scales(shape), shape)
    }

    /// The structure of the C interface, which does not write through it where it stands for an input.
    pub(crate) fn structure(&self) -> sys::mfa_quantization_t {
        sys::mfa_quantization_t {
            scales: self.scales.as_ptr().cast_mut(),
            zero_points: self.zero_points.map_or(std::ptr::null_mut(), |points| points.as_ptr().cast_mut()),
            channel_means: self.channel_means.map_or(std::ptr::null_mut(), |means| means.as_ptr().cast_mut()),
            ..structure(self.granularity, self.rotated)
        }
    }
}

fn structure(granularity: Granularity, rotated: bool) -> sys::mfa_quantization_t {
    sys::mfa_quantization_t {
        struct_size: size_of::<sys::mfa_quantization_t>() as u32,
        granularity: granularity.code(),
        block_size: granularity.block_size(),
        group_size: granularity.group_size(),
        rotated: rotated.into(),
        reserved: 0,
        scales: std::ptr::null_mut(),
        zero_points: std::ptr::null_mut(),
        channel_means: std::ptr::null_mut(),
    }
}

fn part(name: &str, length: Option<usize>, expected: Option<usize>, shape: [usize; 4]) -> Result<()> {
    if length.is_none() || length == expected {
        return Ok(());
    }
    let expected = expected.map_or("more than there can be".into(), |count| count.to_string());
    let length = length.unwrap_or_default();
    Err(Error::InvalidDimensions(format!("mfa::Quantization: {name}: expected {expected} for the shape {shape:?}, got {length}")))
}

/// How one tensor is quantised.
///
/// ```
/// use mfa::{Granularity, QuantizationScheme};
///
/// let scheme = QuantizationScheme::int4().granularity(Granularity::group(32)?).symmetric(false);
/// # mfa::Result::Ok(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[must_use]
pub struct QuantizationScheme {
    precision: Precision,
    granularity: Granularity,
    symmetric: bool,
    smooth: bool,
    rotate: bool,
}

impl QuantizationScheme {
    /// INT8 with a scale a token, symmetric.
    ///
    /// ```
    /// let scheme = mfa::QuantizationScheme::int8();
    /// ```
    pub fn int8() -> Self {
        Self { precision: Precision::Int8, granularity: Granularity::Token, symmetric: true, smooth: false, rotate: false }
    }

    /// INT4 with a scale and a zero point a token.
    ///
    /// ```
    /// let scheme = mfa::QuantizationScheme::int4();
    /// ```
    pub fn int4() -> Self {
        Self { precision: Precision::Int4, symmetric: false, ..Self::int8() }
    }

    /// Which elements share a scale.
    ///
    /// ```
    /// let scheme = mfa::QuantizationScheme::int8().granularity(mfa::Granularity::Head);
    /// ```
    pub fn granularity(mut self, granularity: Granularity) -> Self {
        self.granularity = granularity;
        self
    }

    /// False: with zero points.
    ///
    /// ```
    /// let scheme = mfa::QuantizationScheme::int8().symmetric(false);
    /// ```
    pub fn symmetric(mut self, symmetric: bool) -> Self {
        self.symmetric = symmetric;
        self
    }

    /// Whether each channel's mean over the tokens is subtracted first; keys only.
    ///
    /// ```
    /// let scheme = mfa::QuantizationScheme::int8().smooth(true);
    /// ```
    pub fn smooth(mut self, smooth: bool) -> Self {
        self.smooth = smooth;
        self
    }

    /// Whether each row undergoes a Walsh-Hadamard transform first; queries and keys alike.
    ///
    /// ```
    /// let scheme = mfa::QuantizationScheme::int8().rotate(true);
    /// ```
    pub fn rotate(mut self, rotate: bool) -> Self {
        self.rotate = rotate;
        self
    }

    pub(crate) fn structure(&self) -> sys::mfa_quantization_scheme_t {
        sys::mfa_quantization_scheme_t {
            struct_size: size_of::<sys::mfa_quantization_scheme_t>() as u32,
            precision: self.precision.code(),
            granularity: self.granularity.code(),
            block_size: self.granularity.block_size(),
            group_size: self.granularity.group_size(),
            asymmetric: (!self.symmetric).into(),
            smooth: self.smooth.into(),
            rotate: self.rotate.into(),
        }
    }
}

/// A precision of codes, or a whole scheme for them: what a part of a [`QuantizationConfig`] is.
///
/// ```
/// use mfa::{OperandScheme, QuantizationScheme};
///
/// let chosen_well = OperandScheme::Int8;
/// let exactly_so: OperandScheme = QuantizationScheme::int8().into();
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum OperandScheme {
    /// INT8 by the scheme that suits the operand.
    Int8,
    /// INT4 by the scheme that suits the operand.
    Int4,
    /// Exactly this scheme.
    Scheme(QuantizationScheme),
}

impl From<QuantizationScheme> for OperandScheme {
    fn from(scheme: QuantizationScheme) -> Self {
        Self::Scheme(scheme)
    }
}

/// How attention quantises its float operands before it computes with them. Operands that come quantised are taken as they are.
///
/// [`OperandScheme::Int8`] and [`OperandScheme::Int4`] stand for scales a token, for INT4 with zero points; keys are smoothed; queries and
/// keys are rotated. Where only one of query and key is named so, its rotation follows the other one, as that comes or as its scheme says.
///
/// ```
/// use mfa::{Attention, OperandScheme, QuantizationConfig};
///
/// let simple = Attention::new().quantize(QuantizationConfig::int8());
/// let mixed = QuantizationConfig { value: Some(OperandScheme::Int4), ..QuantizationConfig::int8() };
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct QuantizationConfig {
    /// Scheme of queries; None: they stay as they are.
    pub query: Option<OperandScheme>,
    /// Scheme of keys.
    pub key: Option<OperandScheme>,
    /// Scheme of values.
    pub value: Option<OperandScheme>,
}

impl QuantizationConfig {
    /// All three in INT8.
    ///
    /// ```
    /// assert_eq!(mfa::QuantizationConfig::int8().query, Some(mfa::OperandScheme::Int8));
    /// ```
    pub fn int8() -> Self {
        Self { query: Some(OperandScheme::Int8), key: Some(OperandScheme::Int8), value: Some(OperandScheme::Int8) }
    }

    /// Keys and values in INT4, queries in INT8: they are not stored, so that INT4 would save nothing there.
    ///
    /// ```
    /// assert_eq!(mfa::QuantizationConfig::int4().query, Some(mfa::OperandScheme::Int8));
    /// ```
    pub fn int4() -> Self {
        Self { query: Some(OperandScheme::Int8), key: Some(OperandScheme::Int4), value: Some(OperandScheme::Int4) }
    }

    /// The schemes of query, key and value. `rotated`: whether the one of query and key that comes quantised is; None if neither does.
    pub(crate) fn schemes(&self, rotated: Option<bool>) -> [Option<QuantizationScheme>; 3] {
        let named = |given: Option<OperandScheme>, other: Option<OperandScheme>, is_key: bool| {
            let scheme = match given? {
                OperandScheme::Scheme(scheme) => return Some(scheme),
                OperandScheme::Int8 => QuantizationScheme::int8(),
                OperandScheme::Int4 => QuantizationScheme::int4(),
            };
            let rotate = rotated.unwrap_or(match other {
                Some(OperandScheme::Scheme(scheme)) => scheme.rotate,
                Some(_) => true,
                None => false,
            });
            Some(scheme.smooth(is_key).rotate(rotate))
        };
        let value = self.value.map(|given| match given {
            OperandScheme::Scheme(scheme) => scheme,
            OperandScheme::Int8 => QuantizationScheme::int8(),
            OperandScheme::Int4 => QuantizationScheme::int4(),
        });
        [named(self.query, self.key, false), named(self.key, self.query, true), value]
    }
}

/// The codes of a [`QuantizedTensor`].
///
/// ```
/// let codes = mfa::Codes::Int8(vec![1, -1]);
/// assert_eq!(codes.bytes(), 2);
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Codes {
    /// One byte each.
    Int8(Vec<i8>),
    /// Two a byte, along the channels.
    Int4(Vec<Int4Pair>),
}

impl Codes {
    /// The memory that they take.
    ///
    /// ```
    /// assert_eq!(mfa::Codes::Int4(vec![mfa::Int4Pair::new(1, 2)]).bytes(), 1);
    /// ```
    pub fn bytes(&self) -> usize {
        match self {
            Self::Int8(codes) => codes.len(),
            Self::Int4(codes) => codes.len(),
        }
    }

    fn precision(&self) -> Precision {
        match self {
            Self::Int8(_) => Precision::Int8,
            Self::Int4(_) => Precision::Int4,
        }
    }
}

/// A contiguous tensor `[batch, heads, tokens, channels]` of INT8 or INT4 codes with its scales.
///
/// [`QuantizedTensor::new`] makes it; [`QuantizedTensor::view`] is what attention takes.
///
/// ```
/// use mfa::{MfaContext, QuantizationScheme, QuantizedTensor, TensorView};
///
/// let context = MfaContext::new()?;
/// let keys = vec![0.5f32; 2 * 100 * 64];
/// let quantized = QuantizedTensor::new(&context, TensorView::new(&keys, [1, 2, 100, 64])?, QuantizationScheme::int8())?;
/// assert_eq!(quantized.bytes(), 2 * 100 * (64 + 4));
/// assert_eq!(quantized.dequantize(&context)?, keys);
/// # mfa::Result::Ok(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct QuantizedTensor {
    codes: Codes,
    shape: [usize; 4],
    granularity: Granularity,
    scales: Vec<f32>,
    zero_points: Option<Vec<i32>>,
    channel_means: Option<Vec<f32>>,
    rotated: bool,
}

impl QuantizedTensor {
    /// Quantises a tensor of a float type and any strides.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidArgument`] if a value is not finite, or the tensor not of a float type; [`Error::InvalidDimensions`] for illegal
    /// sizes; [`Error::AllocationFailed`].
    ///
    /// ```
    /// use mfa::{MfaContext, QuantizationScheme, QuantizedTensor, TensorView};
    ///
    /// let values = [f32::NAN; 64];
    /// let scheme = QuantizationScheme::int4();
    /// assert!(QuantizedTensor::new(&MfaContext::new()?, TensorView::new(&values, [1, 1, 1, 64])?, scheme).is_err());
    /// # mfa::Result::Ok(())
    /// ```
    pub fn new(context: &MfaContext, input: TensorView<'_>, scheme: QuantizationScheme) -> Result<Self> {
        let shape = input.shape();
        let row = if scheme.precision == Precision::Int4 { shape[3].div_ceil(2) } else { shape[3] };
        let bytes = [shape[0], shape[1], shape[2]].iter().try_fold(row, |product, &size| product.checked_mul(size));
        let codes = match scheme.precision {
            Precision::Int4 => Codes::Int4(zeros(bytes)?),
            _ => Codes::Int8(zeros(bytes)?),
        };
        let scales = scheme.granularity.scales(shape);
        let mut tensor = Self {
            codes,
            shape,
            granularity: scheme.granularity,
            scales: zeros(scales)?,
            zero_points: if scheme.symmetric { None } else { Some(zeros(scales)?) },
            channel_means: if scheme.smooth { Some(zeros(Granularity::Channel.scales(shape))?) } else { None },
            rotated: scheme.rotate,
        };
        let codes = match &mut tensor.codes {
            Codes::Int8(codes) => TensorViewMut::new(codes, shape)?,
            Codes::Int4(codes) => TensorViewMut::new(codes, shape)?,
        };
        let (zero_points, channel_means) = (tensor.zero_points.as_deref_mut(), tensor.channel_means.as_deref_mut());
        quantize_into(context, input, scheme, codes, &mut tensor.scales, zero_points, channel_means)?;
        Ok(tensor)
    }

    /// A tensor of parts that were stored.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidDimensions`] if a part has not as many elements as the shape takes.
    ///
    /// ```
    /// use mfa::{Codes, Granularity, Quantization, QuantizedTensor};
    ///
    /// let quantization = Quantization::new(Granularity::Tensor, &[0.5]);
    /// let tensor = QuantizedTensor::from_parts(Codes::Int8(vec![2; 6]), [1, 1, 2, 3], quantization)?;
    /// assert_eq!(tensor.dequantize(&mfa::MfaContext::new()?)?, [1.0; 6]);
    /// # mfa::Result::Ok(())
    /// ```
    pub fn from_parts(codes: Codes, shape: [usize; 4], quantization: Quantization<'_>) -> Result<Self> {
        quantization.check(shape)?;
        let tensor = Self {
            codes,
            shape,
            granularity: quantization.granularity,
            scales: quantization.scales.to_vec(),
            zero_points: quantization.zero_points.map(<[i32]>::to_vec),
            channel_means: quantization.channel_means.map(<[f32]>::to_vec),
            rotated: quantization.rotated,
        };
        tensor.raw()?;
        Ok(tensor)
    }

    fn raw(&self) -> Result<RawTensor> {
        Ok(match &self.codes {
            Codes::Int8(codes) => TensorView::new(codes, self.shape)?.raw,
            Codes::Int4(codes) => TensorView::new(codes, self.shape)?.raw,
        })
    }

    /// The tensor as attention takes it.
    ///
    /// # Errors
    ///
    /// None: the parts were checked when the tensor was made.
    ///
    /// ```
    /// # use mfa::{MfaContext, QuantizationScheme, QuantizedTensor, TensorView};
    /// # let context = MfaContext::new()?;
    /// # let scheme = QuantizationScheme::int8();
    /// let keys = QuantizedTensor::new(&context, TensorView::new(&[0.5f32; 64], [1, 1, 1, 64])?, scheme)?;
    /// assert_eq!(keys.view()?.precision(), mfa::Precision::Int8);
    /// # mfa::Result::Ok(())
    /// ```
    pub fn view(&self) -> Result<TensorView<'_>> {
        TensorView::of_raw(self.raw()?).quantized(Quantization {
            granularity: self.granularity,
            scales: &self.scales,
            zero_points: self.zero_points.as_deref(),
            channel_means: self.channel_means.as_deref(),
            rotated: self.rotated,
        })
    }

    /// The real values that the codes stand for.
    ///
    /// # Errors
    ///
    /// [`Error::AllocationFailed`], [`Error::InvalidArgument`] for scales that are not finite and positive.
    ///
    /// ```
    /// # use mfa::{MfaContext, QuantizationScheme, QuantizedTensor, TensorView};
    /// # let context = MfaContext::new()?;
    /// # let scheme = QuantizationScheme::int8().rotate(true);
    /// let keys = QuantizedTensor::new(&context, TensorView::new(&[0.5f32; 64], [1, 1, 1, 64])?, scheme)?;
    /// assert!((keys.dequantize(&context)?[7] - 0.5).abs() < 0.01);
    /// # mfa::Result::Ok(())
    /// ```
    pub fn dequantize(&self, context: &MfaContext) -> Result<Vec<f32>> {
        let elements = self.shape.iter().try_fold(1usize, |product, &size| product.checked_mul(size));
        let mut values = zeros::<f32>(elements)?;
        dequantize(context, self.view()?, TensorViewMut::new(&mut values, self.shape)?)?;
        Ok(values)
    }

    /// The codes.
    ///
    /// ```
    /// # use mfa::{Codes, Granularity, Quantization, QuantizedTensor};
    /// let tensor = QuantizedTensor::from_parts(Codes::Int8(vec![2]), [1; 4], Quantization::new(Granularity::Tensor, &[0.5]))?;
    /// assert_eq!(tensor.codes(), &Codes::Int8(vec![2]));
    /// # mfa::Result::Ok(())
    /// ```
    pub fn codes(&self) -> &Codes {
        &self.codes
    }

    /// How the codes lie in memory.
    ///
    /// ```
    /// # use mfa::{Codes, Granularity, Quantization, QuantizedTensor};
    /// let tensor = QuantizedTensor::from_parts(Codes::Int8(vec![2]), [1; 4], Quantization::new(Granularity::Tensor, &[0.5]))?;
    /// assert_eq!(tensor.precision(), mfa::Precision::Int8);
    /// # mfa::Result::Ok(())
    /// ```
    pub fn precision(&self) -> Precision {
        self.codes.precision()
    }

    /// Batch, heads, tokens, channels.
    ///
    /// ```
    /// # use mfa::{Codes, Granularity, Quantization, QuantizedTensor};
    /// let tensor = QuantizedTensor::from_parts(Codes::Int8(vec![2]), [1; 4], Quantization::new(Granularity::Tensor, &[0.5]))?;
    /// assert_eq!(tensor.shape(), [1, 1, 1, 1]);
    /// # mfa::Result::Ok(())
    /// ```
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// Which elements share a scale.
    ///
    /// ```
    /// # use mfa::{Codes, Granularity, Quantization, QuantizedTensor};
    /// let tensor = QuantizedTensor::from_parts(Codes::Int8(vec![2]), [1; 4], Quantization::new(Granularity::Tensor, &[0.5]))?;
    /// assert_eq!(tensor.granularity(), Granularity::Tensor);
    /// # mfa::Result::Ok(())
    /// ```
    pub fn granularity(&self) -> Granularity {
        self.granularity
    }

    /// The scales, in the order that the granularity says.
    ///
    /// ```
    /// # use mfa::{Codes, Granularity, Quantization, QuantizedTensor};
    /// let tensor = QuantizedTensor::from_parts(Codes::Int8(vec![2]), [1; 4], Quantization::new(Granularity::Tensor, &[0.5]))?;
    /// assert_eq!(tensor.scales(), [0.5]);
    /// # mfa::Result::Ok(())
    /// ```
    pub fn scales(&self) -> &[f32] {
        &self.scales
    }

    /// The zero points, one a scale; None: all 0.
    ///
    /// ```
    /// # use mfa::{Codes, Granularity, Quantization, QuantizedTensor};
    /// let tensor = QuantizedTensor::from_parts(Codes::Int8(vec![2]), [1; 4], Quantization::new(Granularity::Tensor, &[0.5]))?;
    /// assert_eq!(tensor.zero_points(), None);
    /// # mfa::Result::Ok(())
    /// ```
    pub fn zero_points(&self) -> Option<&[i32]> {
        self.zero_points.as_deref()
    }

    /// The means of a smoothed tensor, `[batch, heads, channels]`.
    ///
    /// ```
    /// # use mfa::{Codes, Granularity, Quantization, QuantizedTensor};
    /// let tensor = QuantizedTensor::from_parts(Codes::Int8(vec![2]), [1; 4], Quantization::new(Granularity::Tensor, &[0.5]))?;
    /// assert_eq!(tensor.channel_means(), None);
    /// # mfa::Result::Ok(())
    /// ```
    pub fn channel_means(&self) -> Option<&[f32]> {
        self.channel_means.as_deref()
    }

    /// Whether the codes are those of the Walsh-Hadamard transform of each row.
    ///
    /// ```
    /// # use mfa::{Codes, Granularity, Quantization, QuantizedTensor};
    /// let tensor = QuantizedTensor::from_parts(Codes::Int8(vec![2]), [1; 4], Quantization::new(Granularity::Tensor, &[0.5]))?;
    /// assert!(!tensor.rotated());
    /// # mfa::Result::Ok(())
    /// ```
    pub fn rotated(&self) -> bool {
        self.rotated
    }

    /// The memory of codes, scales, zero points and means.
    ///
    /// ```
    /// # use mfa::{Codes, Granularity, Quantization, QuantizedTensor};
    /// let tensor = QuantizedTensor::from_parts(Codes::Int8(vec![2]), [1; 4], Quantization::new(Granularity::Tensor, &[0.5]))?;
    /// assert_eq!(tensor.bytes(), 5);
    /// # mfa::Result::Ok(())
    /// ```
    pub fn bytes(&self) -> usize {
        let numbers = self.scales.len() + self.zero_points.as_ref().map_or(0, Vec::len) + self.channel_means.as_ref().map_or(0, Vec::len);
        self.codes.bytes() + 4 * numbers
    }
}

/// Quantises `input`, of a float type and any strides, into memory of the caller's: codes of the scheme's precision, as many scales as its
/// granularity takes, zero points exactly if it is asymmetric, and means `[batch, heads, channels]` exactly if it smooths.
///
/// # Errors
///
/// As [`QuantizedTensor::new`]; [`Error::InvalidArgument`] also for zero points or means that the scheme does not have, or lacks, and
/// [`Error::InvalidDimensions`] for parts of another length.
///
/// ```
/// use mfa::{MfaContext, QuantizationScheme, TensorView, TensorViewMut};
///
/// let (values, mut codes, mut scales) = ([1.0f32, -0.5, 0.25, 0.0], [0i8; 4], [0.0f32; 1]);
/// let (input, output) = (TensorView::new(&values, [1, 1, 1, 4])?, TensorViewMut::new(&mut codes, [1, 1, 1, 4])?);
/// mfa::quantize_into(&MfaContext::new()?, input, QuantizationScheme::int8(), output, &mut scales, None, None)?;
/// assert_eq!(codes, [127, -64, 32, 0]);
/// # mfa::Result::Ok(())
/// ```
pub fn quantize_into(
    context: &MfaContext,
    input: TensorView<'_>,
    scheme: QuantizationScheme,
    codes: TensorViewMut<'_>,
    scales: &mut [f32],
    zero_points: Option<&mut [i32]>,
    channel_means: Option<&mut [f32]>,
) -> Result<()> {
    let refused = |argument: &str, words: &str| Err(Error::InvalidArgument(format!("mfa::quantize_into: {argument}: expected {words}")));
    if codes.precision() != scheme.precision {
        return refused("codes", "the precision of the scheme");
    }
    if zero_points.is_some() == scheme.symmetric {
        return refused("zero_points", "some exactly if the scheme is asymmetric");
    }
    if channel_means.is_some() != scheme.smooth {
        return refused("channel_means", "some exactly if the scheme smooths");
    }
    let shape = codes.shape();
    let expected = scheme.granularity.scales(shape);
    part("scales", Some(scales.len()), expected, shape)?;
    part("zero_points", zero_points.as_ref().map(|points| points.len()), expected, shape)?;
    part("channel_means", channel_means.as_ref().map(|means| means.len()), Granularity::Channel.scales(shape), shape)?;
    let quantization = sys::mfa_quantization_t {
        scales: scales.as_mut_ptr(),
        zero_points: zero_points.map_or(std::ptr::null_mut(), <[i32]>::as_mut_ptr),
        channel_means: channel_means.map_or(std::ptr::null_mut(), <[f32]>::as_mut_ptr),
        ..structure(scheme.granularity, scheme.rotate)
    };
    let output = sys::mfa_tensor_t { quantization: &quantization, ..codes.raw.structure() };
    let input = input.raw.structure();
    // SAFETY: the structures describe memory that lives during the call; codes, scales, zero points and means are borrowed exclusively and
    // have as many elements as shape and granularity take.
    check(Some(context), unsafe { sys::mfa_quantize(context.handle(), &input, &output) })
}

/// Writes the real values that the codes of `input` stand for to `output`, of a float type.
///
/// # Errors
///
/// [`Error::InvalidDimensions`] for shapes that differ, [`Error::InvalidArgument`] for other types and for scales that are not finite and
/// positive.
///
/// ```
/// use mfa::{Granularity, MfaContext, Quantization, TensorView, TensorViewMut};
///
/// let input = TensorView::new(&[2i8; 6], [1, 1, 2, 3])?.quantized(Quantization::new(Granularity::Tensor, &[0.5]))?;
/// let mut values = [half::f16::ZERO; 6];
/// mfa::dequantize(&MfaContext::new()?, input, TensorViewMut::new(&mut values, [1, 1, 2, 3])?)?;
/// assert_eq!(values, [half::f16::ONE; 6]);
/// # mfa::Result::Ok(())
/// ```
pub fn dequantize(context: &MfaContext, input: TensorView<'_>, output: TensorViewMut<'_>) -> Result<()> {
    let quantization = input.quantization.map(|quantization| quantization.structure());
    let pointer = quantization.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    let input = sys::mfa_tensor_t { quantization: pointer, ..input.raw.structure() };
    let output = output.raw.structure();
    // SAFETY: the structures describe memory that lives during the call; the output is borrowed exclusively.
    check(Some(context), unsafe { sys::mfa_dequantize(context.handle(), &input, &output) })
}

/// So many zeros, or an error where memory is short.
pub(crate) fn zeros<T: Copy + Default>(length: Option<usize>) -> Result<Vec<T>> {
    let mut values = Vec::new();
    match length {
        Some(length) if values.try_reserve_exact(length).is_ok() => values.resize(length, T::default()),
        _ => {
            let length = length.map_or("more than there can be".into(), |length| length.to_string());
            return Err(Error::AllocationFailed(format!("mfa: memory for {length} elements could not be had")));
        }
    }
    Ok(values)
}
