"""CUDA source of the kernels for given sizes: the files beside this one, after constants and the wgmma wrappers.

A wgmma instruction names every accumulator register, so its wrapper is written out per width here rather than by
hand in CUDA.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["source"]

_ROOM = Path(__file__).parent


def _wgmma(name: str, width: int, *, rows: bool, add: bool, shared: bool = False, kind: str = "bf16") -> str:
    """d [64, width] = a [64, 16] b (`add`: +=), b [16, width] in shared memory, `rows`: k by k, else column by column.

    a is in registers or, `shared`, in shared memory row by row.
    """
    count = width // 2
    outputs = ", ".join(f"%{i}" for i in range(count))
    operands = ", ".join(f'"{"+" if add else "="}f"(d[{i}])' for i in range(count))
    if shared:
        left, inputs, argument, transposes, b = f"%{count}", '"l"(a)', "unsigned long long a", "0, ", count + 1
    else:
        left = "{" + ", ".join(f"%{count + i}" for i in range(4)) + "}"
        inputs = ", ".join(f'"r"(a[{i}])' for i in range(4))
        argument, transposes, b = "const unsigned* a", "", count + 4
    return f"""
__device__ __forceinline__ void {name}(float (&d)[{count}], {argument}, unsigned long long b) {{
    asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, {int(add)}, 0;\\n"
                 "wgmma.mma_async.sync.aligned.m64n{width}k16.f32.{kind}.{kind} {{{outputs}}}, {left}, %{b}, "
                 "p, 1, 1, {transposes}{int(rows)};\\n}}"
                 : {operands}
                 : {inputs}, "l"(b));
}}
"""


def source(*files: str, **constants: int) -> str:
    """The text of `files` with integer constants defined, ready for NVRTC or nvcc."""
    defines = "".join(f"#define {name} {value}\n" for name, value in constants.items())
    keys = constants["K"]
    wrappers = [_wgmma("first_64", 64, rows=False, add=False), _wgmma("add_64", 64, rows=False, add=True),
                _wgmma("add_64_rows", 64, rows=True, add=True), _wgmma("add_keys", keys, rows=True, add=True),
                _wgmma("first_64_half", 64, rows=False, add=False, kind="f16"),
                _wgmma("add_64_half", 64, rows=False, add=True, kind="f16"),
                _wgmma("first_64_rows_half", 64, rows=True, add=False, kind="f16"),
                _wgmma("add_64_rows_half", 64, rows=True, add=True, kind="f16"),
                _wgmma("add_64_shared", 64, rows=False, add=True, shared=True),
                _wgmma("add_keys_shared", keys, rows=True, add=True, shared=True)]
    return defines + "".join([*wrappers, *((_ROOM / file).read_text() for file in ("ptx.cuh", "tiles.cuh", *files))])
