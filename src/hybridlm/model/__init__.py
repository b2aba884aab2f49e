"""The language model as PyTorch modules, for training and as the readable reference of every other implementation."""

from hybridlm.model.cache import Cache
from hybridlm.model.language_model import HybridLM

__all__ = ["Cache", "HybridLM"]
