"""Compile a kernel for sm_90 without a GPU: its registers, spills and shared memory."""
import re, subprocess, tempfile, pathlib
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

def compile_kernel(fn, types: dict, constants: dict, aligned=(), **options):
    """types: name -> Triton type for each argument that is no constant; aligned: names that are multiples of 16."""
    names = fn.arg_names
    signature = {n: ("constexpr" if n in constants else types[n]) for n in names}
    attrs = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in aligned or str(types.get(n,"")).startswith("*")}
    source = ASTSource(fn, signature, {(names.index(n),): v for n, v in constants.items()}, attrs)
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(done.asm["cubin"]); f.flush()
        tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        text = subprocess.run([str(tool), "--dump-resource-usage", f.name], capture_output=True, text=True).stdout
    m = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    return done, {"regs": int(m[1]), "stack": int(m[2]), "local": int(m[4]), "shared": done.metadata.shared}
