//! Buffers: memory with a size and a device's own handle.

use std::ffi::c_void;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use mfa_sys as sys;

use crate::error::{Error, Result, check};
use crate::tensor::Memory;
use crate::{Element, MfaContext};

/// Memory of elements of one type, with a device's own handle, so that a GPU needs no copy; freed when it is dropped.
///
/// Buffers are optional on the CPU, where slices do as well. It is a slice too, by [`Deref`]. It may outlive the context that it was made
/// with, and serve any context on the same device.
///
/// ```
/// use mfa::{MfaBuffer, MfaContext};
///
/// let context = MfaContext::new()?;
/// let mut owned = MfaBuffer::<f32>::new(&context, 64)?;
/// owned[0] = 1.0;
///
/// let mut elements = vec![half::f16::ONE; 64];
/// let borrowed = MfaBuffer::from_slice(&context, &mut elements)?;
/// assert_eq!(borrowed[63], half::f16::ONE);
/// # mfa::Result::Ok(())
/// ```
///
/// A buffer that borrows a slice cannot outlive it:
///
/// ```compile_fail,E0597
/// let context = mfa::MfaContext::new()?;
/// let buffer = {
///     let mut elements = vec![0.0f32; 64];
///     mfa::MfaBuffer::from_slice(&context, &mut elements)?
/// };
/// println!("{}", buffer[0]);
/// # mfa::Result::Ok(())
/// ```
///
/// nor can the slice be used meanwhile:
///
/// ```compile_fail,E0502
/// let context = mfa::MfaContext::new()?;
/// let mut elements = vec![0.0f32; 64];
/// let buffer = mfa::MfaBuffer::from_slice(&context, &mut elements)?;
/// println!("{}", elements[0]);
/// drop(buffer);
/// # mfa::Result::Ok(())
/// ```
pub struct MfaBuffer<'memory, T: Element> {
    handle: NonNull<sys::mfa_buffer_t>,
    elements: NonNull<T>,
    length: usize,
    memory: PhantomData<&'memory mut [T]>,
}

// SAFETY: a buffer is a slice with a handle, a token that the library accepts on any thread.
unsafe impl<T: Element> Send for MfaBuffer<'_, T> {}
// SAFETY: a shared buffer gives shared slices; its handle is a token that the library looks up under a lock.
unsafe impl<T: Element> Sync for MfaBuffer<'_, T> {}

impl<T: Element> MfaBuffer<'static, T> {
    /// Memory for `length` elements, all of them 0, aligned to the page.
    ///
    /// # Errors
    ///
    /// [`Error::AllocationFailed`], [`Error::InvalidDimensions`] if there can be no such memory.
    ///
    /// ```
    /// let context = mfa::MfaContext::new()?;
    /// let buffer = mfa::MfaBuffer::<f32>::new(&context, 1024)?;
    /// assert!(buffer.iter().all(|&element| element == 0.0));
    /// # mfa::Result::Ok(())
    /// ```
    pub fn new(context: &MfaContext, length: usize) -> Result<Self> {
        let Some(size) = length.checked_mul(size_of::<T>()).filter(|&size| size <= isize::MAX as usize) else {
            return Err(Error::InvalidDimensions(format!("mfa::MfaBuffer::new: length: expected what memory can hold, got {length}")));
        };
        let mut handle = std::ptr::null_mut();
        // SAFETY: the context is valid and the handle's place writable.
        check(Some(context), unsafe { sys::mfa_create_buffer(context.handle(), size, &mut handle) })?;
        // SAFETY: a question about the handle; the memory is there as long as it is.
        let elements = unsafe { sys::mfa_buffer_contents(handle) };
        Self::of_handle(handle, elements.cast(), length)
    }
}

impl<'memory, T: Element> MfaBuffer<'memory, T> {
    /// A buffer on the memory of a slice, without a copy.
    ///
    /// # Errors
    ///
    /// [`Error::AllocationFailed`].
    ///
    /// ```
    /// let context = mfa::MfaContext::new()?;
    /// let mut elements = [1.0f32, 2.0];
    /// let mut buffer = mfa::MfaBuffer::from_slice(&context, &mut elements)?;
    /// buffer[0] = 3.0;
    /// drop(buffer);
    /// assert_eq!(elements, [3.0, 2.0]);
    /// # mfa::Result::Ok(())
    /// ```
    pub fn from_slice(context: &MfaContext, elements: &'memory mut [T]) -> Result<Self> {
        let mut handle = std::ptr::null_mut();
        let (size, length) = (size_of_val(elements), elements.len());
        let pointer = elements.as_mut_ptr();
        // SAFETY: the slice is borrowed exclusively for 'memory, and the buffer, which bears this lifetime, is destroyed before it ends. A
        // buffer that is forgotten instead leaves a handle that nobody has.
        let status = unsafe { sys::mfa_create_buffer_from_memory(context.handle(), pointer.cast(), size, &mut handle) };
        check(Some(context), status)?;
        Self::of_handle(handle, pointer, length)
    }

    fn of_handle(handle: *mut sys::mfa_buffer_t, elements: *mut T, length: usize) -> Result<Self> {
        let handle = NonNull::new(handle)
            .ok_or_else(|| Error::AllocationFailed("mfa::MfaBuffer: expected a buffer from the library, got none".into()))?;
        let elements = NonNull::new(elements).unwrap_or(NonNull::dangling());
        let buffer = Self { handle, elements, length, memory: PhantomData };
        if buffer.elements == NonNull::dangling() && length > 0 {
            return Err(Error::Unsupported("mfa::MfaBuffer: expected memory that the host can read, got none".into()));
        }
        Ok(buffer)
    }

    /// The address of the first element, for C functions.
    ///
    /// ```
    /// let context = mfa::MfaContext::new()?;
    /// let buffer = mfa::MfaBuffer::<f32>::new(&context, 16)?;
    /// assert!(!buffer.as_void_ptr().is_null());
    /// # mfa::Result::Ok(())
    /// ```
    pub fn as_void_ptr(&self) -> *mut c_void {
        self.elements.as_ptr().cast()
    }

    /// The handle, for C functions that take a buffer. It is valid as long as `self` is.
    ///
    /// ```
    /// let context = mfa::MfaContext::new()?;
    /// let buffer = mfa::MfaBuffer::<i8>::new(&context, 16)?;
    /// // SAFETY: the handle is that of a buffer.
    /// assert_eq!(unsafe { mfa::sys::mfa_buffer_size(buffer.handle()) }, 16);
    /// # mfa::Result::Ok(())
    /// ```
    pub fn handle(&self) -> *mut sys::mfa_buffer_t {
        self.handle.as_ptr()
    }

    pub(crate) fn memory(&self) -> Memory {
        Memory { data: self.as_void_ptr(), buffer: self.handle(), length: self.length }
    }
}

impl<T: Element> Deref for MfaBuffer<'_, T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: the memory holds as many elements, begun as zeros or as a slice, and no one writes while this borrow lasts: views to write
        // to borrow the buffer exclusively.
        unsafe { std::slice::from_raw_parts(self.elements.as_ptr(), self.length) }
    }
}

impl<T: Element> DerefMut for MfaBuffer<'_, T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as for deref; the buffer is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.elements.as_ptr(), self.length) }
    }
}

impl<T: Element> Drop for MfaBuffer<'_, T> {
    fn drop(&mut self) {
        // SAFETY: the handle is this buffer's own and not used after this. The status could only say that it is no buffer.
        unsafe { sys::mfa_destroy_buffer(self.handle.as_ptr()) };
    }
}

impl<T: Element> std::fmt::Debug for MfaBuffer<'_, T> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("MfaBuffer").field("precision", &T::PRECISION).field("len", &self.length).finish()
    }
}

/// The buffers of one head: query, key, value and output.
///
/// ```
/// let context = mfa::MfaContext::new()?;
/// let mfa::Buffers { query, key, value, output } = mfa::create_buffers(&context, 128, 64)?;
/// # mfa::Result::Ok(())
/// ```
#[derive(Debug)]
pub struct Buffers {
    /// `[seq_len, head_dim]`
    pub query: MfaBuffer<'static, f32>,
    /// `[seq_len, head_dim]`
    pub key: MfaBuffer<'static, f32>,
    /// `[seq_len, head_dim]`
    pub value: MfaBuffer<'static, f32>,
    /// `[seq_len, head_dim]`
    pub output: MfaBuffer<'static, f32>,
}

/// Buffers for attention of one head in FP32, all of them 0.
///
/// # Errors
///
/// As [`MfaBuffer::new`].
///
/// ```
/// let context = mfa::MfaContext::new()?;
/// let buffers = mfa::create_buffers(&context, 128, 64)?;
/// assert_eq!(buffers.query.len(), 128 * 64);
/// # mfa::Result::Ok(())
/// ```
pub fn create_buffers(context: &MfaContext, seq_len: usize, head_dim: usize) -> Result<Buffers> {
    let length = seq_len.saturating_mul(head_dim);
    Ok(Buffers {
        query: MfaBuffer::new(context, length)?,
        key: MfaBuffer::new(context, length)?,
        value: MfaBuffer::new(context, length)?,
        output: MfaBuffer::new(context, length)?,
    })
}
