//! Universal quantised Flash Attention: scaled dot-product attention, exact or quantised to INT8 and INT4, forward and backward, in memory
//! that grows with the sequence lengths and never with their product.
//!
//! ```
//! use mfa::{Alignment, Attention, MfaContext, QuantizationScheme, QuantizedTensor, TensorView, TensorViewMut};
//!
//! let context = MfaContext::new()?;
//! let shape = [1, 8, 128, 64]; // batch, heads, tokens, channels
//! let elements: Vec<f32> = (0..shape.iter().product()).map(|index| (index as f32).sin()).collect();
//! let query = TensorView::new(&elements, shape)?;
//! let mut output = vec![0.0f32; elements.len()];
//!
//! let attention = Attention::new().causal(Alignment::UpperLeft);
//! attention.forward(&context, query, query, query, TensorViewMut::new(&mut output, shape)?)?;
//!
//! // The same with keys and values in INT8, as a cache would keep them.
//! let cache = QuantizedTensor::new(&context, query, QuantizationScheme::int8())?;
//! attention.forward(&context, query, cache.view()?, cache.view()?, TensorViewMut::new(&mut output, shape)?)?;
//! # mfa::Result::Ok(())
//! ```
//!
//! - [`MfaContext`] is a device with its threads and workspace. Each thread makes its own.
//! - [`TensorView`] and [`TensorViewMut`] view slices, or an [`MfaBuffer`], by any strides; nothing is copied.
//! - [`Attention`] holds the options and computes: forward, forward with logsumexp, backward. [`merge`] joins parts of the keys.
//! - [`QuantizedTensor`] is codes with scales; [`QuantizationConfig`] quantises on the way in.
//!
//! Whatever is wrong with a call comes back as an [`Error`], and nothing has been written then. No input makes this crate panic, and no
//! function of it needs `unsafe` but those that take addresses. [`sys`] has the C functions themselves.
//!
//! What is computed, to the last rule for masks, empty rows and NaN, is written down in `docs/numerics.md` of the repository; `docs/rust.md`
//! is a guide.

mod attention;
mod buffer;
mod context;
mod element;
mod error;
mod quantization;
mod statistics;
mod tensor;

pub use attention::{Alignment, Attention, Gradients, Operation, Partial, merge};
pub use buffer::{Buffers, MfaBuffer, create_buffers};
pub use context::{ContextBuilder, ContextInfo, Device, MfaContext, version};
pub use element::{Element, Int4Pair, Precision};
pub use error::{Error, Result};
pub use quantization::{
    Codes, Granularity, OperandScheme, Quantization, QuantizationConfig, QuantizationScheme, QuantizedTensor, dequantize, quantize_into,
};
pub use statistics::{Statistics, StatisticsMut};
pub use tensor::{TensorView, TensorViewMut};

/// The C functions themselves.
pub use mfa_sys as sys;

/// The programs in the guide and in the README, which are tested like all examples.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/rust.md")]
#[doc = include_str!("../../../README.md")]
mod documents {}
