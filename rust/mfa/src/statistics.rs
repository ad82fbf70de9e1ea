//! Numbers a row or a head: logsumexp, sinks, slopes, their gradients.

use std::ffi::c_void;

use crate::error::{Error, Result};

/// Numbers a row or a head, which are read: logsumexp `[batch, num_heads, seq_len_q]`, sinks and slopes `[num_heads]`.
///
/// They are `f32`, or `f64` if an operand is `f64`. Slices, arrays and vectors become one by themselves.
///
/// ```
/// let slopes = [0.5f32, 0.25];
/// let attention = mfa::Attention::new().alibi_slopes(&slopes);
/// ```
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum Statistics<'a> {
    /// With operands of any other type.
    Fp32(&'a [f32]),
    /// With an operand of `f64`.
    Fp64(&'a [f64]),
}

/// Numbers a row or a head, which are written: otherwise as [`Statistics`].
///
/// ```
/// let mut grad_sinks = vec![0.0f32; 8];
/// let statistics: mfa::StatisticsMut = (&mut grad_sinks).into();
/// ```
#[derive(Debug)]
#[non_exhaustive]
pub enum StatisticsMut<'a> {
    /// With operands of any other type.
    Fp32(&'a mut [f32]),
    /// With an operand of `f64`.
    Fp64(&'a mut [f64]),
}

macro_rules! conversions {
    ($($type:ty: $variant:ident),*) => {$(
        impl<'a> From<&'a [$type]> for Statistics<'a> {
            fn from(numbers: &'a [$type]) -> Self {
                Self::$variant(numbers)
            }
        }
        impl<'a> From<&'a Vec<$type>> for Statistics<'a> {
            fn from(numbers: &'a Vec<$type>) -> Self {
                Self::$variant(numbers)
            }
        }
        impl<'a, const N: usize> From<&'a [$type; N]> for Statistics<'a> {
            fn from(numbers: &'a [$type; N]) -> Self {
                Self::$variant(numbers)
            }
        }
        impl<'a> From<&'a mut [$type]> for StatisticsMut<'a> {
            fn from(numbers: &'a mut [$type]) -> Self {
                Self::$variant(numbers)
            }
        }
        impl<'a> From<&'a mut Vec<$type>> for StatisticsMut<'a> {
            fn from(numbers: &'a mut Vec<$type>) -> Self {
                Self::$variant(numbers)
            }
        }
        impl<'a, const N: usize> From<&'a mut [$type; N]> for StatisticsMut<'a> {
            fn from(numbers: &'a mut [$type; N]) -> Self {
                Self::$variant(numbers)
            }
        }
    )*};
}
conversions!(f32: Fp32, f64: Fp64);

impl Statistics<'_> {
    /// The address for the library, which trusts the length and type: both are checked here.
    pub(crate) fn pointer(&self, function: &str, argument: &str, double: bool, expected: Option<usize>) -> Result<*const c_void> {
        let (pointer, length, is_double) = match self {
            Self::Fp32(numbers) => (numbers.as_ptr().cast(), numbers.len(), false),
            Self::Fp64(numbers) => (numbers.as_ptr().cast(), numbers.len(), true),
        };
        checked(function, argument, length, is_double, double, expected)?;
        Ok(pointer)
    }
}

impl StatisticsMut<'_> {
    pub(crate) fn pointer(&mut self, function: &str, argument: &str, double: bool, expected: Option<usize>) -> Result<*mut c_void> {
        let (pointer, length, is_double) = match self {
            Self::Fp32(numbers) => (numbers.as_mut_ptr().cast(), numbers.len(), false),
            Self::Fp64(numbers) => (numbers.as_mut_ptr().cast(), numbers.len(), true),
        };
        checked(function, argument, length, is_double, double, expected)?;
        Ok(pointer)
    }
}

fn checked(function: &str, argument: &str, length: usize, is_double: bool, double: bool, expected: Option<usize>) -> Result<()> {
    if expected != Some(length) {
        let expected = expected.map_or("more than there can be".into(), |count| count.to_string());
        return Err(Error::InvalidDimensions(format!("mfa::{function}: {argument}: expected {expected} numbers, got {length}")));
    }
    if is_double != double {
        let (expected, got) = if double { ("f64, like an operand", "f32") } else { ("f32", "f64") };
        return Err(Error::InvalidArgument(format!("mfa::{function}: {argument}: expected numbers of {expected}, got {got}")));
    }
    Ok(())
}
