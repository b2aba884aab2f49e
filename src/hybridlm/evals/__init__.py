"""Evaluations over a small protocol, `Scorer`, that engines and PyTorch models both satisfy."""

from hybridlm.evals.bits_per_byte import BitsPerByte, bits_per_byte, documents_of
from hybridlm.evals.scorer import Scorer

__all__ = ["BitsPerByte", "Scorer", "bits_per_byte", "documents_of"]
