"""hybridlm: train, evaluate, quantise and run hybrid (Gated DeltaNet + attention) language models.

Importing the package, its configuration and the CPU runtime never imports PyTorch; `HybridLM` does, when it is
first touched.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hybridlm.config import HybridConfig

if TYPE_CHECKING:
    from hybridlm.engine import Engine
    from hybridlm.model import HybridLM

__version__ = "0.1.0"
__all__ = ["Engine", "HybridConfig", "HybridLM", "__version__"]

_LAZY = {"Engine": "hybridlm.engine", "HybridLM": "hybridlm.model"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'hybridlm' has no attribute {name!r}")
