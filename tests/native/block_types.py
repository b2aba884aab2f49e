"""The ggml types that the kernels know, random blocks of them, and gguf-py's word for what the blocks mean."""

import gguf
import numpy as np

TYPES = {
    "F32": 0, "F16": 1, "BF16": 30, "Q8_0": 8, "Q4_0": 2, "Q5_0": 6, "IQ4_NL": 20, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14,
}
QUANTISED = [name for name in TYPES if name not in ("F32", "F16", "BF16")]


def block(name: str) -> tuple[int, int]:
    """Weights and bytes of a block."""
    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(TYPES[name])]


def row_bytes(name: str, cols: int) -> int:
    weights, size = block(name)
    assert cols % weights == 0
    return cols // weights * size


def meaning(name: str, raw: np.ndarray, cols: int) -> np.ndarray:
    """float32 [rows, cols], decoded by gguf-py."""
    return gguf.dequantize(raw, gguf.GGMLQuantizationType(TYPES[name])).reshape(len(raw), cols).astype(np.float32)


def random_blocks(name: str, rows: int, cols: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 [rows, bytes]: every bit random but for the floats, which are modest numbers of either sign."""
    if name in ("F32", "F16", "BF16"):
        x = rng.standard_normal((rows, cols)).astype(np.float32)
        return gguf.quantize(x, gguf.GGMLQuantizationType(TYPES[name])).view(np.uint8).reshape(rows, -1)
    weights, size = block(name)
    raw = rng.integers(0, 256, (rows, cols // weights, size), dtype=np.uint8)
    places = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}.get(name, (0,))
    for place in places:
        halves = (rng.standard_normal((rows, cols // weights)) * 0.01).astype(np.float16)
        raw[:, :, place : place + 2] = halves.view(np.uint8).reshape(rows, -1, 2)
    return raw.reshape(rows, -1)
