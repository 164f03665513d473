"""HadaCore: int4 weights and rotated 8-bit attention for Hugging Face Transformers.

Importing this package registers the "hadacore" quantization method and attention with transformers.
"""

from . import compat, errors
from ._version import __version__
from .attention.functional import quantized_attention
from .attention.kv_cache import HadaCoreCache, use_quantized_caches
from .config import QUANT_METHOD, HadaCoreConfig
from .kernels.hadamard import hadamard_transform
from .kernels.rotate_quantize import rotate_quantize
from .modules.linear import HadaCoreLinear
from .quantizer import HadaCoreHfQuantizer

__all__ = [
    "HadaCoreCache",
    "HadaCoreConfig",
    "HadaCoreHfQuantizer",
    "HadaCoreLinear",
    "__version__",
    "errors",
    "hadamard_transform",
    "quantized_attention",
    "rotate_quantize",
]

compat.register(QUANT_METHOD, HadaCoreConfig, HadaCoreHfQuantizer)
use_quantized_caches()
