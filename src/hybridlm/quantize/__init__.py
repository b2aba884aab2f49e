"""Re-encoding a GGUF file in another type or mix, `quantize(source, out, "q4_m")`, and what calibration text says about
its columns, `collect(source, texts)`."""

from hybridlm.quantize.importance import Importance, collect
from hybridlm.quantize.requantize import quantize

__all__ = ["Importance", "collect", "quantize"]
