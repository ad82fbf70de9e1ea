"""Universal quantised Flash Attention for NumPy arrays, by way of the Rust crate `mfa`.

The functions have the names, options and results of those of `umfa`; `docs/rust.md` in the repository says what differs.
"""

from umfa_rs._umfa_rs import (
    MfaBuffer,
    MfaContext,
    QuantizationConfig,
    QuantizationScheme,
    QuantizedTensor,
    __version__,
    attention,
    attention_backward,
    quantize,
)
from umfa_rs.errors import (
    DeviceUnavailableError,
    ExecutionError,
    InvalidArgumentError,
    InvalidContextError,
    InvalidDimensionsError,
    InvalidTypeError,
    MFAError,
    OutOfMemoryError,
    UnsupportedError,
)

__all__ = [
    "DeviceUnavailableError",
    "ExecutionError",
    "InvalidArgumentError",
    "InvalidContextError",
    "InvalidDimensionsError",
    "InvalidTypeError",
    "MFAError",
    "MfaBuffer",
    "MfaContext",
    "OutOfMemoryError",
    "QuantizationConfig",
    "QuantizationScheme",
    "QuantizedTensor",
    "UnsupportedError",
    "__version__",
    "attention",
    "attention_backward",
    "quantize",
]
