"""Re-encoding a GGUF file in another type: `quantize(source, out, "q4_0")`."""

from hybridlm.quantize.requantize import quantize

__all__ = ["quantize"]
