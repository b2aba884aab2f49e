"""The Triton kernels of the gated delta rule without a GPU: what they compute, in Triton's interpreter, and what they
take of a Hopper multiprocessor, compiled offline."""
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is for Linux")
torch = pytest.importorskip("torch")

from tests.ops.triton.interpret_delta_rule import CASES  # noqa: E402

LOOSE = {  # rounding grows where keys cancel, and where a gradient is a small difference
    "beta near 2, keys near collinear, no decay": 2e-4,
    "decay near 0": 1e-4,
}


@pytest.fixture(scope="module")
def errors():
    script = Path(__file__).with_name("interpret_delta_rule.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_kernels_compute_the_recurrence(errors, case):
    assert errors[case] and all(e < LOOSE.get(case, 5e-6) for e in errors[case].values()), errors[case]


# -- compiled for a Hopper GPU, without one --------------------------------------------------------------------------

NARROW = {"q", "k", "v", "do", "inverse", "rest_inverse", "scores", "o", "states", "writes", "w", "dv", "dq", "dk",
          "dstates", "first_scratch", "second_scratch"}
INTEGERS = {"time": "i32", "sequences": "i32", "width": "i32", "scale": "fp32", "bounds": "*i32", "offsets": "*i32"}


def usage(kernel, key=96, value=192, target=90, **constants):
    """(registers, bytes of stack and of shared memory, wgmma instructions) of a kernel as `delta_rule` launches it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hybridlm.ops.triton import delta_rule

    first, second = delta_rule.widths(key)
    every = {"H": 4, "HK": 2, "K": key, "V": value, "KA": first, "KB": second, "BV": 64, "NORM": True, "VARLEN": True,
             "PRECISION": "fp16", "INITIAL": True, **constants}
    every = {name: x for name, x in every.items() if name in kernel.arg_names}
    types = {name: INTEGERS.get(name, "*bf16" if name in NARROW else "*fp32") for name in kernel.arg_names}
    signature = {name: "constexpr" if name in every else types[name] for name in kernel.arg_names}
    places = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    attributes = {places[n]: [["tt.divisibility", 16]] for n, t in signature.items() if t.startswith("*")}
    compiled = triton.compile(
        ASTSource(kernel, signature, {places[name]: x for name, x in every.items()}, attributes),
        target=GPUTarget("cuda", target, 32), options=delta_rule.LAUNCH[kernel.__name__])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True,
                              check=True).stdout
    found = dict(re.findall(r"(REG|STACK):(\d+)", text))
    return (int(found["REG"]), int(found["STACK"]), compiled.metadata.shared,
            compiled.asm["ptx"].count("wgmma.mma_async"))


LIMITS = [
    ("prepare_kernel", {}, 128, 56, 4),
    ("scan_kernel", {"OUTPUT": True, "STATES": False}, 32, 112, 2),
    ("scan_kernel", {"OUTPUT": False, "STATES": True}, 32, 112, 2),
    ("reverse_scan_kernel", {}, 32, 112, 2),
    ("gradient_kernel", {}, 640, 112, 2),
]


@pytest.mark.parametrize("name, constants, stack, shared, blocks", LIMITS)
def test_kernels_fit_a_hopper_multiprocessor(name, constants, stack, shared, blocks):
    """At Olmo Hybrid's widths: products on the tensor cores, registers (64 K of 4 bytes) and shared memory (kilobytes)
    for so many blocks, and no more bytes spilled."""
    from hybridlm.ops.triton import delta_rule

    registers, spilled, bytes_shared, products = usage(getattr(delta_rule, name), **constants)
    threads = 32 * delta_rule.LAUNCH[name]["num_warps"]
    assert products > 0 and spilled <= stack and bytes_shared <= shared << 10
    assert registers * threads * blocks <= 64 << 10


@pytest.mark.parametrize("key, value", [
    (256, 256), *(pytest.param(k, v, marks=pytest.mark.slow) for k, v in [(16, 16), (112, 80), (128, 128), (192, 64)])])
def test_every_width_compiles(key, value):
    from hybridlm.ops.triton import delta_rule

    for name, constants, *_ in LIMITS:
        assert usage(getattr(delta_rule, name), key, value, **constants)[2] <= 227 << 10


@pytest.mark.parametrize("target", [89, pytest.param(120, marks=pytest.mark.slow)])
def test_consumer_gpus_have_room(target):
    """99 KB of shared memory, and the older tensor core instructions."""
    from hybridlm.ops.triton import delta_rule

    for name, constants, *_ in LIMITS:
        assert usage(getattr(delta_rule, name), 128, target=target, **constants)[2] <= 99 << 10
