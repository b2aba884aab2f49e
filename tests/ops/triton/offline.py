"""Compiles Triton kernels for sm_90 on a machine without a GPU, and says what they take of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def compile_sm90(kernel, types: dict[str, str], constants: dict, num_warps: int, aligned: tuple[str, ...] = (),
                 **options) -> dict[str, int]:
    """{"registers", "spilled" (bytes of stack), "shared"} of a kernel; `types` as in Triton: "*bf16", "i32", "fp32";
    `aligned` names integers that are multiples of 16, as all pointers are."""
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    positions = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name, kind in types.items()
                  if kind.startswith("*") or name in aligned}
    compiled = triton.compile(ASTSource(kernel, signature, positions, attributes),
                              target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps, **options})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        text = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED):(\d+)", text)}
    return {"registers": usage["REG"], "spilled": usage["STACK"], "shared": compiled.metadata.shared}
