//! Strided views of tensors.

use std::ffi::c_void;
use std::marker::PhantomData;

use mfa_sys as sys;

use crate::error::{Error, Result};
use crate::quantization::Quantization;
use crate::{Element, MfaBuffer, Precision};

/// What a view is, without its lifetime.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RawTensor {
    pub precision: Precision,
    /// Address of element (0, 0, 0, 0), if it does not lie in a buffer.
    pub data: *mut c_void,
    pub buffer: *mut sys::mfa_buffer_t,
    pub buffer_offset: u64,
    pub shape: [usize; 4],
    pub strides: [isize; 4],
}

impl RawTensor {
    /// The structure of the C interface, without quantisation. A size or stride that does not fit there becomes one that is refused there.
    pub fn structure(&self) -> sys::mfa_tensor_t {
        sys::mfa_tensor_t {
            struct_size: size_of::<sys::mfa_tensor_t>() as u32,
            precision: self.precision.code(),
            data: self.data,
            buffer: self.buffer,
            buffer_offset: self.buffer_offset,
            shape: self.shape.map(|size| i64::try_from(size).unwrap_or(i64::MAX)),
            strides: self.strides.map(|stride| stride as i64),
            quantization: std::ptr::null(),
        }
    }
}

/// Where the elements of a view begin: in plain memory, or in a buffer of the library's.
#[derive(Clone, Copy)]
pub(crate) struct Memory {
    pub data: *mut c_void,
    pub buffer: *mut sys::mfa_buffer_t,
    pub length: usize,
}

impl Memory {
    fn of<T: Element>(elements: &[T]) -> Self {
        Self { data: elements.as_ptr().cast_mut().cast(), buffer: std::ptr::null_mut(), length: elements.len() }
    }

    fn of_mut<T: Element>(elements: &mut [T]) -> Self {
        Self { data: elements.as_mut_ptr().cast(), buffer: std::ptr::null_mut(), length: elements.len() }
    }
}

/// Strides of a contiguous tensor.
fn contiguous(shape: [usize; 4], channels_per_value: usize) -> [isize; 4] {
    let row = shape[3].div_ceil(channels_per_value).saturating_mul(channels_per_value);
    let head = row.saturating_mul(shape[2]);
    let batch = head.saturating_mul(shape[1]);
    [batch as isize, head as isize, row as isize, 1]
}

/// Elements of memory that a contiguous tensor takes; None if there are too many for any memory.
fn elements_of<T: Element>(shape: [usize; 4]) -> Option<usize> {
    [shape[0], shape[1], shape[2], shape[3].div_ceil(T::CHANNELS)].iter().try_fold(1usize, |product, &size| product.checked_mul(size))
}

pub(crate) fn contiguous_tensor<T: Element>(memory: Memory, shape: [usize; 4]) -> Result<RawTensor> {
    let needed = elements_of::<T>(shape);
    if needed != Some(memory.length) {
        return Err(wrong_length(needed, shape, memory.length));
    }
    Ok(raw::<T>(memory, 0, shape, contiguous(shape, T::CHANNELS)))
}

#[cold]
fn wrong_length(needed: Option<usize>, shape: [usize; 4], length: usize) -> Error {
    let needed = needed.map_or("more than there can be".into(), |count| count.to_string());
    Error::InvalidDimensions(format!("mfa::TensorView: elements: expected {needed} for the shape {shape:?}, got {length}"))
}

pub(crate) fn strided_tensor<T: Element>(memory: Memory, offset: usize, shape: [usize; 4], strides: [isize; 4]) -> Result<RawTensor> {
    let per_value = T::CHANNELS as i128;
    if per_value == 2 && strides[..3].iter().any(|stride| stride % 2 != 0) {
        return Err(Error::InvalidArgument(format!(
            "mfa::TensorView: strides: expected even ones of INT4 codes but for the channels, got {strides:?}"
        )));
    }
    if shape.iter().any(|&size| size > u32::MAX as usize) {
        return Err(Error::InvalidDimensions(format!("mfa::TensorView: shape: expected sizes of at most {}, got {shape:?}", u32::MAX)));
    }
    if !shape.contains(&0) {
        // The first and the last value that any index reaches; 32 bits times 64 bits do not overflow 128.
        let (mut first, mut last) = (offset as i128, offset as i128);
        for axis in 0..4 {
            let steps = if axis == 3 { (shape[3] - 1) as i128 / per_value * per_value } else { (shape[axis] - 1) as i128 };
            let distance = steps * strides[axis] as i128 / per_value;
            if distance < 0 {
                first += distance;
            } else {
                last += distance;
            }
        }
        if first < 0 || last >= memory.length as i128 {
            return Err(Error::InvalidDimensions(format!(
                "mfa::TensorView: strides: expected ones that stay within {} elements, got {strides:?} for the shape {shape:?}, which \
                 reach from {first} to {last}",
                memory.length
            )));
        }
    } else if offset > memory.length {
        return Err(Error::InvalidDimensions(format!("mfa::TensorView: offset: expected at most {}, got {offset}", memory.length)));
    }
    Ok(raw::<T>(memory, offset, shape, strides))
}

fn raw<T: Element>(memory: Memory, offset: usize, shape: [usize; 4], strides: [isize; 4]) -> RawTensor {
    let in_buffer = !memory.buffer.is_null();
    // The offset is within the memory, whose bytes fit into an isize; wrapping arithmetic needs no proof of that.
    let data = if in_buffer { std::ptr::null_mut() } else { memory.data.wrapping_byte_add(offset.wrapping_mul(size_of::<T>())) };
    let buffer_offset = if in_buffer { (offset * size_of::<T>()) as u64 } else { 0 };
    RawTensor { precision: T::PRECISION, data, buffer: memory.buffer, buffer_offset, shape, strides }
}

/// Swaps the axes of tokens and heads.
fn swapped<T: Copy>(values: [T; 4]) -> [T; 4] {
    [values[0], values[2], values[1], values[3]]
}

/// A view of a tensor that is read: four sizes and strides, in the order batch, head, token, channel, over elements of any type.
///
/// It borrows the memory, which is never copied. Views are small and `Copy`.
///
/// ```
/// use mfa::TensorView;
///
/// let elements = [0.0f32; 2 * 128 * 8 * 64];
/// let view = TensorView::new(&elements, [2, 8, 128, 64])?;              // [batch, heads, tokens, channels]
/// let other = TensorView::new_bshd(&elements, [2, 128, 8, 64])?;        // [batch, tokens, heads, channels] in memory
/// assert_eq!(view.shape(), other.shape());
/// # mfa::Result::Ok(())
/// ```
///
/// It cannot outlive what it views:
///
/// ```compile_fail,E0597
/// let view = {
///     let elements = vec![0.0f32; 64];
///     mfa::TensorView::new(&elements, [1, 1, 1, 64])?
/// };
/// println!("{view:?}");
/// # mfa::Result::Ok(())
/// ```
#[derive(Debug, Clone, Copy)]
pub struct TensorView<'a> {
    pub(crate) raw: RawTensor,
    pub(crate) quantization: Option<Quantization<'a>>,
    memory: PhantomData<&'a [u8]>,
}

// SAFETY: a view is a shared borrow of memory that consists of plain numbers.
unsafe impl Send for TensorView<'_> {}
// SAFETY: as above.
unsafe impl Sync for TensorView<'_> {}

impl<'a> TensorView<'a> {
    pub(crate) fn of_raw(raw: RawTensor) -> Self {
        Self { raw, quantization: None, memory: PhantomData }
    }

    /// A contiguous tensor `[batch, heads, tokens, channels]`.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidDimensions`] unless there are as many elements as the shape takes; of [`Int4Pair`](crate::Int4Pair), a row takes half
    /// as many as it has channels, rounded up.
    ///
    /// ```
    /// let view = mfa::TensorView::new(&[0i8; 24], [1, 2, 3, 4])?;
    /// assert_eq!(view.strides(), [24, 12, 4, 1]);
    /// # mfa::Result::Ok(())
    /// ```
    pub fn new<T: Element>(elements: &'a [T], shape: [usize; 4]) -> Result<Self> {
        Ok(Self::of_raw(contiguous_tensor::<T>(Memory::of(elements), shape)?))
    }

    /// A contiguous tensor that lies as `[batch, tokens, heads, channels]`; `shape` is in this order too.
    ///
    /// # Errors
    ///
    /// As [`TensorView::new`].
    ///
    /// ```
    /// let view = mfa::TensorView::new_bshd(&[0.0f32; 24], [1, 3, 2, 4])?;
    /// assert_eq!(view.shape(), [1, 2, 3, 4]);
    /// assert_eq!(view.strides(), [24, 4, 8, 1]);
    /// # mfa::Result::Ok(())
    /// ```
    pub fn new_bshd<T: Element>(elements: &'a [T], shape: [usize; 4]) -> Result<Self> {
        Ok(Self::new(elements, shape)?.swap_heads_and_tokens())
    }

    /// Any strides, in elements (of INT4, in codes), over a slice whose element `offset` is that of index (0, 0, 0, 0). A stride may be 0,
    /// to broadcast, or negative.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidDimensions`] if an index reaches beyond the slice, [`Error::InvalidArgument`] for odd strides of INT4 other than the
    /// channels'.
    ///
    /// ```
    /// // The queries within a packed [batch, tokens, 3, heads, channels].
    /// let (tokens, heads, channels) = (10usize, 4usize, 16usize);
    /// let packed = vec![0.0f32; tokens * 3 * heads * channels];
    /// let strides = [packed.len(), channels, 3 * heads * channels, 1].map(|stride| stride as isize);
    /// let query = mfa::TensorView::with_strides(&packed, 0, [1, heads, tokens, channels], strides)?;
    /// let key = mfa::TensorView::with_strides(&packed, heads * channels, [1, heads, tokens, channels], strides)?;
    /// # mfa::Result::Ok(())
    /// ```
    pub fn with_strides<T: Element>(elements: &'a [T], offset: usize, shape: [usize; 4], strides: [isize; 4]) -> Result<Self> {
        Ok(Self::of_raw(strided_tensor::<T>(Memory::of(elements), offset, shape, strides)?))
    }

    /// A view of memory that the compiler does not know about.
    ///
    /// # Safety
    ///
    /// For `'a`, every element that an index within `shape` reaches from `data` by `strides` lies in memory that may be read, is aligned to
    /// its size, and is not written while the library computes.
    ///
    /// ```
    /// let elements = [1.0f32; 6];
    /// // SAFETY: the array has these six elements.
    /// let view = unsafe { mfa::TensorView::from_raw_parts(mfa::Precision::Fp32, elements.as_ptr().cast(), [1, 1, 2, 3], [6, 6, 3, 1]) };
    /// assert_eq!(view.shape(), [1, 1, 2, 3]);
    /// ```
    pub unsafe fn from_raw_parts(precision: Precision, data: *const c_void, shape: [usize; 4], strides: [isize; 4]) -> Self {
        Self::of_raw(RawTensor { precision, data: data.cast_mut(), buffer: std::ptr::null_mut(), buffer_offset: 0, shape, strides })
    }

    /// The same codes with scales: see [`Quantization`].
    ///
    /// # Errors
    ///
    /// [`Error::InvalidArgument`] unless the elements are INT8 or INT4, [`Error::InvalidDimensions`] if there are not as many scales, zero
    /// points or means as the shape takes, or a block or group has no size.
    ///
    /// ```
    /// use mfa::{Granularity, Quantization, TensorView};
    ///
    /// let scales = [0.5f32, 0.25];
    /// let view = TensorView::new(&[1i8; 6], [1, 1, 2, 3])?.quantized(Quantization::new(Granularity::Token, &scales))?;
    /// # mfa::Result::Ok(())
    /// ```
    pub fn quantized(mut self, quantization: Quantization<'a>) -> Result<Self> {
        if !matches!(self.raw.precision, Precision::Int8 | Precision::Int4) {
            return Err(Error::InvalidArgument(format!(
                "mfa::TensorView::quantized: expected INT8 or INT4 codes, got {:?}",
                self.raw.precision
            )));
        }
        quantization.check(self.raw.shape)?;
        self.quantization = Some(quantization);
        Ok(self)
    }

    /// The same tensor with the axes of heads and tokens swapped.
    ///
    /// ```
    /// let view = mfa::TensorView::new(&[0.0f32; 24], [1, 2, 3, 4])?.swap_heads_and_tokens();
    /// assert_eq!(view.shape(), [1, 3, 2, 4]);
    /// # mfa::Result::Ok(())
    /// ```
    pub fn swap_heads_and_tokens(mut self) -> Self {
        // Scales would be those of other elements; a tensor gets them in its final order.
        self.quantization = None;
        self.raw.shape = swapped(self.raw.shape);
        self.raw.strides = swapped(self.raw.strides);
        self
    }

    /// How the elements lie in memory.
    ///
    /// ```
    /// assert_eq!(mfa::TensorView::new(&[true], [1; 4])?.precision(), mfa::Precision::Bool);
    /// # mfa::Result::Ok(())
    /// ```
    pub fn precision(&self) -> Precision {
        self.raw.precision
    }

    /// Batch, heads, tokens, channels.
    ///
    /// ```
    /// assert_eq!(mfa::TensorView::new(&[0.0f64; 6], [1, 1, 2, 3])?.shape(), [1, 1, 2, 3]);
    /// # mfa::Result::Ok(())
    /// ```
    pub fn shape(&self) -> [usize; 4] {
        self.raw.shape
    }

    /// Strides in elements (of INT4, in codes), in the order of the shape.
    ///
    /// ```
    /// assert_eq!(mfa::TensorView::new(&[0.0f64; 6], [1, 1, 2, 3])?.strides(), [6, 6, 3, 1]);
    /// # mfa::Result::Ok(())
    /// ```
    pub fn strides(&self) -> [isize; 4] {
        self.raw.strides
    }
}

/// A view of a tensor that is written. Otherwise it is like [`TensorView`], but not `Copy`, since no two may view the same memory.
///
/// ```
/// let mut elements = [0.0f32; 24];
/// let view = mfa::TensorViewMut::new(&mut elements, [1, 2, 3, 4])?;
/// # mfa::Result::Ok(())
/// ```
///
/// ```compile_fail,E0499
/// let mut elements = [0.0f32; 24];
/// let first = mfa::TensorViewMut::new(&mut elements, [1, 2, 3, 4])?;
/// let second = mfa::TensorViewMut::new(&mut elements, [1, 2, 3, 4])?; // two outputs in the same memory
/// println!("{first:?} {second:?}");
/// # mfa::Result::Ok(())
/// ```
#[derive(Debug)]
pub struct TensorViewMut<'a> {
    pub(crate) raw: RawTensor,
    memory: PhantomData<&'a mut [u8]>,
}

// SAFETY: a view is an exclusive borrow of memory that consists of plain numbers.
unsafe impl Send for TensorViewMut<'_> {}
// SAFETY: nothing can be written through a shared reference to the view.
unsafe impl Sync for TensorViewMut<'_> {}

impl<'a> TensorViewMut<'a> {
    pub(crate) fn of_raw(raw: RawTensor) -> Self {
        Self { raw, memory: PhantomData }
    }

    /// A contiguous tensor `[batch, heads, tokens, channels]`.
    ///
    /// # Errors
    ///
    /// As [`TensorView::new`].
    ///
    /// ```
    /// let mut elements = vec![half::bf16::ZERO; 24];
    /// let view = mfa::TensorViewMut::new(&mut elements, [1, 2, 3, 4])?;
    /// # mfa::Result::Ok(())
    /// ```
    pub fn new<T: Element>(elements: &'a mut [T], shape: [usize; 4]) -> Result<Self> {
        Ok(Self::of_raw(contiguous_tensor::<T>(Memory::of_mut(elements), shape)?))
    }

    /// A contiguous tensor that lies as `[batch, tokens, heads, channels]`; `shape` is in this order too.
    ///
    /// # Errors
    ///
    /// As [`TensorView::new`].
    ///
    /// ```
    /// let mut elements = [0.0f32; 24];
    /// assert_eq!(mfa::TensorViewMut::new_bshd(&mut elements, [1, 3, 2, 4])?.shape(), [1, 2, 3, 4]);
    /// # mfa::Result::Ok(())
    /// ```
    pub fn new_bshd<T: Element>(elements: &'a mut [T], shape: [usize; 4]) -> Result<Self> {
        let mut view = Self::new(elements, shape)?;
        view.raw.shape = swapped(view.raw.shape);
        view.raw.strides = swapped(view.raw.strides);
        Ok(view)
    }

    /// Any strides, as [`TensorView::with_strides`]. The library refuses an output whose own elements may coincide.
    ///
    /// # Errors
    ///
    /// As [`TensorView::with_strides`].
    ///
    /// ```
    /// let mut elements = [0.0f32; 32];
    /// let every_other = mfa::TensorViewMut::with_strides(&mut elements, 0, [1, 1, 4, 4], [32, 32, 8, 2])?;
    /// # mfa::Result::Ok(())
    /// ```
    pub fn with_strides<T: Element>(elements: &'a mut [T], offset: usize, shape: [usize; 4], strides: [isize; 4]) -> Result<Self> {
        Ok(Self::of_raw(strided_tensor::<T>(Memory::of_mut(elements), offset, shape, strides)?))
    }

    /// A view of memory that the compiler does not know about.
    ///
    /// # Safety
    ///
    /// As [`TensorView::from_raw_parts`]; the memory may also be written, and for `'a` nothing else reads or writes it.
    ///
    /// ```
    /// let mut elements = [1.0f32; 6];
    /// let data = elements.as_mut_ptr().cast();
    /// // SAFETY: the array has these six elements, and nothing else uses them.
    /// let view = unsafe { mfa::TensorViewMut::from_raw_parts(mfa::Precision::Fp32, data, [1, 1, 2, 3], [6, 6, 3, 1]) };
    /// assert_eq!(view.shape(), [1, 1, 2, 3]);
    /// ```
    pub unsafe fn from_raw_parts(precision: Precision, data: *mut c_void, shape: [usize; 4], strides: [isize; 4]) -> Self {
        Self::of_raw(RawTensor { precision, data, buffer: std::ptr::null_mut(), buffer_offset: 0, shape, strides })
    }

    /// The same tensor, to be read.
    ///
    /// ```
    /// let mut elements = [0.0f32; 6];
    /// let view = mfa::TensorViewMut::new(&mut elements, [1, 1, 2, 3])?;
    /// assert_eq!(view.as_view().shape(), view.shape());
    /// # mfa::Result::Ok(())
    /// ```
    pub fn as_view(&self) -> TensorView<'_> {
        TensorView::of_raw(self.raw)
    }

    /// The same tensor for a shorter time, so that the view can be used again afterwards.
    ///
    /// ```
    /// let mut elements = [0.0f32; 6];
    /// let mut view = mfa::TensorViewMut::new(&mut elements, [1, 1, 2, 3])?;
    /// drop(view.reborrow());
    /// assert_eq!(view.shape(), [1, 1, 2, 3]);
    /// # mfa::Result::Ok(())
    /// ```
    pub fn reborrow(&mut self) -> TensorViewMut<'_> {
        TensorViewMut::of_raw(self.raw)
    }

    /// How the elements lie in memory.
    ///
    /// ```
    /// let mut elements = [0.0f32; 6];
    /// assert_eq!(mfa::TensorViewMut::new(&mut elements, [1, 1, 2, 3])?.precision(), mfa::Precision::Fp32);
    /// # mfa::Result::Ok(())
    /// ```
    pub fn precision(&self) -> Precision {
        self.raw.precision
    }

    /// Batch, heads, tokens, channels.
    ///
    /// ```
    /// let mut elements = [0.0f32; 6];
    /// assert_eq!(mfa::TensorViewMut::new(&mut elements, [1, 1, 2, 3])?.shape(), [1, 1, 2, 3]);
    /// # mfa::Result::Ok(())
    /// ```
    pub fn shape(&self) -> [usize; 4] {
        self.raw.shape
    }

    /// Strides in elements (of INT4, in codes), in the order of the shape.
    ///
    /// ```
    /// let mut elements = [0.0f32; 6];
    /// assert_eq!(mfa::TensorViewMut::new(&mut elements, [1, 1, 2, 3])?.strides(), [6, 6, 3, 1]);
    /// # mfa::Result::Ok(())
    /// ```
    pub fn strides(&self) -> [isize; 4] {
        self.raw.strides
    }
}

impl<'memory, T: Element> MfaBuffer<'memory, T> {
    /// A contiguous tensor `[batch, heads, tokens, channels]` on the whole buffer, to be read.
    ///
    /// # Errors
    ///
    /// As [`TensorView::new`].
    ///
    /// ```
    /// let context = mfa::MfaContext::new()?;
    /// let keys = mfa::MfaBuffer::<half::f16>::new(&context, 8 * 128 * 64)?;
    /// assert_eq!(keys.view([1, 8, 128, 64])?.precision(), mfa::Precision::Fp16);
    /// # mfa::Result::Ok(())
    /// ```
    pub fn view(&self, shape: [usize; 4]) -> Result<TensorView<'_>> {
        Ok(TensorView::of_raw(contiguous_tensor::<T>(self.memory(), shape)?))
    }

    /// Any strides over the buffer, to be read: as [`TensorView::with_strides`].
    ///
    /// # Errors
    ///
    /// As [`TensorView::with_strides`].
    ///
    /// ```
    /// let context = mfa::MfaContext::new()?;
    /// let cache = mfa::MfaBuffer::<f32>::new(&context, 4 * 1024 * 64)?;
    /// let used = cache.view_with_strides(0, [1, 4, 100, 64], [4 * 1024 * 64, 1024 * 64, 64, 1])?; // the first 100 of 1,024 tokens
    /// # mfa::Result::Ok(())
    /// ```
    pub fn view_with_strides(&self, offset: usize, shape: [usize; 4], strides: [isize; 4]) -> Result<TensorView<'_>> {
        Ok(TensorView::of_raw(strided_tensor::<T>(self.memory(), offset, shape, strides)?))
    }

    /// A contiguous tensor `[batch, heads, tokens, channels]` on the whole buffer, to be written.
    ///
    /// # Errors
    ///
    /// As [`TensorView::new`].
    ///
    /// ```
    /// let context = mfa::MfaContext::new()?;
    /// let mut output = mfa::MfaBuffer::<f32>::new(&context, 8 * 128 * 64)?;
    /// let view = output.view_mut([1, 8, 128, 64])?;
    /// # mfa::Result::Ok(())
    /// ```
    pub fn view_mut(&mut self, shape: [usize; 4]) -> Result<TensorViewMut<'_>> {
        Ok(TensorViewMut::of_raw(contiguous_tensor::<T>(self.memory(), shape)?))
    }

    /// Any strides over the buffer, to be written: as [`TensorView::with_strides`].
    ///
    /// # Errors
    ///
    /// As [`TensorView::with_strides`].
    ///
    /// ```
    /// let context = mfa::MfaContext::new()?;
    /// let mut output = mfa::MfaBuffer::<f32>::new(&context, 128 * 8 * 64)?;
    /// let bshd = output.view_mut_with_strides(0, [1, 8, 128, 64], [128 * 8 * 64, 64, 8 * 64, 1])?;
    /// # mfa::Result::Ok(())
    /// ```
    pub fn view_mut_with_strides(&mut self, offset: usize, shape: [usize; 4], strides: [isize; 4]) -> Result<TensorViewMut<'_>> {
        Ok(TensorViewMut::of_raw(strided_tensor::<T>(self.memory(), offset, shape, strides)?))
    }
}
