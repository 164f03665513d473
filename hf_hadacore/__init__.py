"""HadaCore: int4 weights and rotated 8-bit attention for Hugging Face Transformers.

Importing this package registers the "hadacore" quantization method and attention with transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import compat, errors
from ._version import __version__
from .attention.functional import quantized_attention
from .attention.kv_cache import HadaCoreCache, use_quantized_caches
from .config import QUANT_METHOD, HadaCoreConfig
from .decoding.generation import disable_cuda_graphs, enable_cuda_graphs
from .kernels.hadamard import hadamard_transform
from .kernels.rotate_quantize import rotate_quantize
from .modules.linear import HadaCoreLinear
from .quantizer import HadaCoreHfQuantizer

__all__ = [
    "Calibration",
    "HadaCoreCache",
    "HadaCoreConfig",
    "HadaCoreHfQuantizer",
    "HadaCoreLinear",
    "__version__",
    "disable_cuda_graphs",
    "enable_cuda_graphs",
    "errors",
    "export_checkpoint",
    "hadamard_transform",
    "import_checkpoint",
    "quantize_checkpoint",
    "quantized_attention",
    "rotate_quantize",
    "use_one_shot_all_reduce",
]

# Imported when they are asked for: who loads a model needs none of them.
_ON_DEMAND = {
    "Calibration": ".offline.calibration",
    "export_checkpoint": ".interchange.exporting",
    "import_checkpoint": ".interchange.importing",
    "quantize_checkpoint": ".offline.checkpoint",
    "use_one_shot_all_reduce": ".parallel.one_shot",
}

if TYPE_CHECKING:
    from .interchange.exporting import export_checkpoint
    from .interchange.importing import import_checkpoint
    from .offline.calibration import Calibration
    from .offline.checkpoint import quantize_checkpoint
    from .parallel.one_shot import use_one_shot_all_reduce
else:

    def __getattr__(name: str) -> Any:
        if name not in _ON_DEMAND:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_ON_DEMAND[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_ON_DEMAND})


compat.register(QUANT_METHOD, HadaCoreConfig, HadaCoreHfQuantizer)
use_quantized_caches()
