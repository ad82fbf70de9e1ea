"""Universal quantised Flash Attention.

>>> import numpy, umfa
>>> q = k = v = numpy.random.randn(1, 8, 1024, 64).astype("float32")
>>> output = umfa.attention(q, k, v, causal=True)
>>> output = umfa.attention(q, k, v, quantize="int8")

`attention` and `attention_backward` take NumPy arrays, PyTorch CPU tensors and DLPack producers without copies;
`flash_attention_forward` is the same in the layout of the C functions, `MetalSDPA` with PyTorch's signature. PyTorch's autograd follows all
three forward functions. `merge` makes one result of two, over parts of the keys. `quantize` makes `QuantizedTensor`. `MFAContext` and
`MFABuffer` say where to compute and with what memory; `info` says what there is. Errors are `MFAError` and its subclasses.
"""

from umfa._library import version as __version__
from umfa.attention import attention, attention_backward, flash_attention_forward
from umfa.buffer import MFABuffer
from umfa.context import MFAContext
from umfa.errors import (
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
from umfa.info import info
from umfa.merge import merge
from umfa.quantization import QuantizationConfig, QuantizationScheme, QuantizedTensor, quantize
from umfa.sdpa import MetalSDPA

__all__ = [
    "DeviceUnavailableError",
    "ExecutionError",
    "InvalidArgumentError",
    "InvalidContextError",
    "InvalidDimensionsError",
    "InvalidTypeError",
    "MFABuffer",
    "MFAContext",
    "MFAError",
    "MetalSDPA",
    "OutOfMemoryError",
    "QuantizationConfig",
    "QuantizationScheme",
    "QuantizedTensor",
    "UnsupportedError",
    "__version__",
    "attention",
    "attention_backward",
    "flash_attention_forward",
    "info",
    "merge",
    "quantize",
]
