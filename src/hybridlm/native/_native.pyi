"""The compiled kernels. Arrays are C-contiguous numpy; results go into arrays that the caller gives.

Every call releases the GIL, runs on the one pool of threads of the process, and checks shapes (ValueError).
T rows (tokens), D width of a row, Hk/Hv key/value heads of Gated DeltaNet, K/V their widths, H/Hkv heads of attention.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]

def available() -> list[str]:
    """Instruction sets of this build that this machine can run, worst first: "scalar", "avx2", "avx512", "amx" (AVX-512
    and tiles), or "neon"."""

def isa() -> str:
    """The one in use; at import the best available, or the one named by HYBRIDLM_ISA."""

def set_isa(name: str) -> None: ...
def threads() -> int: ...
def set_threads(count: int) -> None:
    """Threads that work on a call, the calling one included."""

class Matrix:
    """A [rows, cols] matrix whose rows are blocks of one ggml type, read where it lies (a mapped file, say) or from a
    repacked copy where that is faster. Keeps `data` alive as long as it reads from it."""

    def __init__(self, data: Any, type: int, rows: int, cols: int) -> None: ...
    @property
    def rows(self) -> int: ...
    @property
    def cols(self) -> int: ...
    @property
    def type(self) -> int: ...
    @property
    def nbytes(self) -> int:
        """Bytes that one pass over the matrix reads."""

def linear(x: F32, weights: list[Matrix], outs: list[F32], exact: bool = False, prompt: bool = False) -> None:
    """outs[i][T, rows_i] = x[T, cols] W_i^T. Quantised weights meet 8-bit activations (one scale a block of 32), unless
    `exact`, which keeps them in float32: the reference that the fast path is measured against.

    `prompt` says that x is rows of long texts: where the processor multiplies tiles ("amx"), both sides are rounded to
    bfloat16 then, which is faster from about 32 rows on and nearer to float32. A row's results depend on this choice,
    never on how many rows come with it."""

def embed(table: Matrix, ids: NDArray[np.int32], out: F32) -> None:
    """out[t] = row ids[t] of the table. IndexError for an id outside it."""

def rms_norm(x: F32, weight: F32, eps: float, out: F32) -> None:
    """Over rows: weight * x * rsqrt(mean(x^2) + eps)."""

def swiglu(gate: F32, up: F32, out: F32) -> None: ...
def add(x: F32, y: F32) -> None:
    """x += y."""

def rope(x: F32, positions: NDArray[np.int32], inv_freq: F32, scale: float) -> None:
    """Rotate, in place, each head of x [T, H * d]: halves (i, i + d/2) by positions[t] * inv_freq[i], times scale."""

def gdn(
    q: F32, k: F32, v: F32, a: F32, b: F32, gate: F32,  # [T, Hk K], [T, Hk K], [T, Hv V], [T, Hv], [T, Hv], [T, Hv V]
    conv_q: F32, conv_k: F32, conv_v: F32,  # taps [channels, W], oldest first
    ssm_a: F32, dt_bias: F32, norm: F32,  # [Hv], [Hv], [V]
    conv_state: F32, state: F32,  # [channels of q|k|v, W - 1] oldest first; [Hv, K, V]; both updated in place
    eps: float, allow_neg_eigval: bool,
    out: F32,  # [T, Hv V]
    chunked: bool = True,  # False: token by token, the reference for the chunked form
    history: F32 | None = None,  # [T, Hv, K, V]: the state after each token too (forces the recurrent form)
) -> None:
    """One sequence through a Gated DeltaNet mixer between its projections: causal depthwise convolution and SiLU,
    l2norm of q and k (1e-6 on the sum), q *= K^-0.5, decay exp(ssm_a * softplus(a + dt_bias)), beta = sigmoid(b)
    (times 2 with allow_neg_eigval), the delta rule, then per head RMSNorm(eps) * norm * SiLU(gate). State in float32.

    Up to 16 tokens go token by token whatever `chunked` says: bit for bit the same in one call or one at a time. Longer
    calls go in chunks of 16, the same to rounding (about 1e-6), and bit for bit however they are cut at multiples of 16
    into calls of more than 16. Results never depend on the number of threads."""

def attention(
    q: F32,  # [T, H d]: rows at positions start .. start + T - 1
    table: NDArray[np.uint64],  # [blocks, 2]: addresses of the K and V block of tokens 0.., block.., ...
    block: int,  # tokens a block; one block is [Hkv, block, d] in kv_type
    kv_type: int,  # ggml type: 0 F32, 1 F16, 8 Q8_0
    start: int, kv_heads: int, head_dim: int, window: int,  # window 0: none
    out: F32,  # [T, H d]
) -> None:
    """Causal softmax attention over stored keys and values, scale head_dim^-0.5; query head h reads kv head
    h // (H / Hkv). With a window, a token sees itself and the window - 1 tokens before it. A row of Q8_0 is whole
    blocks of 32 (34 bytes each), the last padded with zeros. Results never depend on the number of threads."""

def store_kv(x: F32, table: NDArray[np.uint64], which: int, block: int, kv_type: int, start: int, kv_heads: int,
             head_dim: int) -> None:
    """Write x [T, Hkv d] as tokens start.. into the K (which = 0) or V (which = 1) blocks."""

def quantize(type: int, x: F32, out: NDArray[np.uint8], importance: F32 | None = None) -> None:
    """Rows of x [rows, cols] as blocks of a type into out [rows, bytes of a row]; `importance` [cols] weighs errors."""

def dequantize(type: int, data: NDArray[np.uint8], out: F32) -> None:
    """The inverse: out [rows, cols]."""

def read_bandwidth(data: NDArray[np.uint8], repeats: int = 1) -> float:
    """Bytes a second that all threads together read from `data` (give it several times the last cache)."""

def int8_peak(seconds: float = 0.2) -> float:
    """Multiply-adds times two a second of register-resident 8-bit dot products on all threads."""

def tile_peak(seconds: float = 0.2) -> float:
    """The same of bfloat16 tiles; 0 where the instruction set in use has none."""
