"""Inference: an open model, sessions, generation. Never imports torch."""

from hybridlm.engine.engine import Engine
from hybridlm.engine.generate import Generation
from hybridlm.engine.prefix_cache import PrefixCache
from hybridlm.engine.sampler import Sampler
from hybridlm.engine.session import Session
from hybridlm.engine.state import State
from hybridlm.engine.writer import Piece

__all__ = ["Engine", "Generation", "Piece", "PrefixCache", "Sampler", "Session", "State"]
