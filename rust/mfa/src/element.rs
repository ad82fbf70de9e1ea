//! Types of elements.

use half::{bf16, f16};
use mfa_sys as sys;

/// How an operand lies in memory.
///
/// ```
/// use mfa::{Element, Precision};
///
/// assert_eq!(<half::f16 as Element>::PRECISION, Precision::Fp16);
/// assert!(Precision::Fp16.is_float() && !Precision::Int8.is_float());
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Precision {
    /// `f32`.
    Fp32,
    /// [`half::f16`].
    Fp16,
    /// [`half::bf16`].
    Bf16,
    /// `f64`: reference kernels on the CPU, for checks of gradients.
    Fp64,
    /// [`Int4Pair`]: two codes a byte.
    Int4,
    /// `i8` codes.
    Int8,
    /// `bool`, for masks: true = attend.
    Bool,
}

impl Precision {
    /// The code of `mfa.h`.
    ///
    /// ```
    /// assert_eq!(mfa::Precision::Int8.code(), mfa::sys::MFA_PRECISION_INT8);
    /// ```
    pub const fn code(self) -> i32 {
        match self {
            Self::Fp32 => sys::MFA_PRECISION_FP32,
            Self::Fp16 => sys::MFA_PRECISION_FP16,
            Self::Bf16 => sys::MFA_PRECISION_BF16,
            Self::Fp64 => sys::MFA_PRECISION_FP64,
            Self::Int4 => sys::MFA_PRECISION_INT4,
            Self::Int8 => sys::MFA_PRECISION_INT8,
            Self::Bool => sys::MFA_PRECISION_BOOL,
        }
    }

    /// Whether it is a float type.
    ///
    /// ```
    /// assert!(mfa::Precision::Bf16.is_float());
    /// ```
    pub const fn is_float(self) -> bool {
        matches!(self, Self::Fp32 | Self::Fp16 | Self::Bf16 | Self::Fp64)
    }
}

mod sealed {
    pub trait Sealed {}
}

/// A type that tensors are made of: `f32`, [`half::f16`], [`half::bf16`], `f64`, `i8`, [`Int4Pair`], and `bool` for masks.
///
/// The trait is sealed: the library knows no other types. All bytes zero is a value of each of them.
///
/// ```
/// fn bits<T: mfa::Element>() -> usize {
///     8 * size_of::<T>() / T::CHANNELS
/// }
/// assert_eq!(bits::<mfa::Int4Pair>(), 4);
/// ```
pub trait Element: sealed::Sealed + Copy + Send + Sync + std::fmt::Debug + 'static {
    /// The precision of tensors that are made of this.
    const PRECISION: Precision;
    /// How many channels of a tensor lie in one value: 2 for [`Int4Pair`], else 1.
    const CHANNELS: usize = 1;
}

macro_rules! elements {
    ($($type:ty: $precision:ident),*) => {$(
        impl sealed::Sealed for $type {}
        impl Element for $type {
            const PRECISION: Precision = Precision::$precision;
        }
    )*};
}
elements!(f32: Fp32, f16: Fp16, bf16: Bf16, f64: Fp64, i8: Int8, bool: Bool);

/// Two INT4 codes in a byte: those of an even channel and of the one after it.
///
/// ```
/// let pair = mfa::Int4Pair::new(-8, 7);
/// assert_eq!((pair.even(), pair.odd()), (-8, 7));
/// assert_eq!(pair.0, 0x78);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[repr(transparent)]
pub struct Int4Pair(
    /// The byte: the even channel's code in the low nibble, both in two's complement.
    pub u8,
);

impl Int4Pair {
    /// Packs the codes of an even channel and of the next one; of each, the low four bits count.
    ///
    /// ```
    /// assert_eq!(mfa::Int4Pair::new(1, -1).0, 0xf1);
    /// ```
    pub const fn new(even: i8, odd: i8) -> Self {
        Self((even as u8 & 15) | ((odd as u8) << 4))
    }

    /// The code of the even channel, -8 to 7.
    ///
    /// ```
    /// assert_eq!(mfa::Int4Pair(0x0f).even(), -1);
    /// ```
    pub const fn even(self) -> i8 {
        ((self.0 << 4) as i8) >> 4
    }

    /// The code of the odd channel, -8 to 7.
    ///
    /// ```
    /// assert_eq!(mfa::Int4Pair(0x70).odd(), 7);
    /// ```
    pub const fn odd(self) -> i8 {
        (self.0 as i8) >> 4
    }
}

impl sealed::Sealed for Int4Pair {}
impl Element for Int4Pair {
    const PRECISION: Precision = Precision::Int4;
    const CHANNELS: usize = 2;
}
