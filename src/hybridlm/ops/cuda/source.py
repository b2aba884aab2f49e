"""CUDA source of the kernels for given sizes: the files beside this one, after constants and the wgmma wrappers.

A wgmma instruction names every accumulator register, so its wrapper is written out per width here rather than by
hand in CUDA.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["source"]

_ROOM = Path(__file__).parent


def _wgmma(name: str, width: int, transpose: bool, add: bool) -> str:
    """d [64, width] = a [64, 16] b (`add`: +=), a in registers, b [16, width] in shared memory; `transpose`: rows are k."""
    count = width // 2
    outputs = ", ".join(f"%{i}" for i in range(count))
    left = ", ".join(f"%{count + i}" for i in range(4))
    operands = ", ".join(f'"{"+" if add else "="}f"(d[{i}])' for i in range(count))
    return f"""
__device__ __forceinline__ void {name}(float (&d)[{count}], const unsigned* a, unsigned long long b) {{
    asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, {int(add)}, 0;\\n"
                 "wgmma.mma_async.sync.aligned.m64n{width}k16.f32.bf16.bf16 {{{outputs}}}, {{{left}}}, %{count + 4}, "
                 "p, 1, 1, {int(transpose)};\\n}}"
                 : {operands}
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}}
"""


def source(*files: str, **constants: int) -> str:
    """The text of `files` with integer constants defined, ready for NVRTC or nvcc."""
    defines = "".join(f"#define {name} {value}\n" for name, value in constants.items())
    wrappers = [_wgmma("first_64", 64, False, False), _wgmma("add_64", 64, False, True),
                _wgmma("first_64_rows", 64, True, False), _wgmma("add_64_rows", 64, True, True),
                _wgmma("add_keys", constants["K"], True, True)]
    return defines + "".join([*wrappers, *((_ROOM / file).read_text() for file in ("ptx.cuh", "tiles.cuh", *files))])
