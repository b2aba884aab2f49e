"""The Triton kernels around the matrix products without a GPU: what they compute, in Triton's interpreter, and what
they take of a Hopper multiprocessor, compiled offline."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is for Linux")
torch = pytest.importorskip("torch")

from tests.ops.triton.interpret_pointwise import CASES  # noqa: E402
from tests.ops.triton.offline import compile_sm90  # noqa: E402

from hybridlm.ops.triton import convolution, cross_entropy, gated_norm, rms_norm, swiglu  # noqa: E402

BF16, FP32, INT, LONG = "*bf16", "*fp32", "i32", "i64"


@pytest.fixture(scope="module")
def errors():
    script = Path(__file__).with_name("interpret_pointwise.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_kernels_compute_the_formulas(errors, case):
    assert errors[case] and all(e < 2e-6 for e in errors[case].values()), errors[case]


def norm(kernel, tile, types, limit, **constants):
    rows, block, warps = tile
    return kernel, types, {"ROWS": rows, "BLOCK": block, **constants}, warps, limit


def kernels():
    for width in (768, 2048, 3840):
        yield norm(rms_norm.rms_norm_forward_kernel, rms_norm._tile(width),
                   {"x_ptr": BF16, "residual_ptr": BF16, "weight_ptr": FP32, "y_ptr": BF16, "sum_ptr": BF16,
                    "rows": INT, "x_stride": INT, "residual_stride": INT, "eps": "fp32"}, 64, D=width, ADD=True)
        yield norm(rms_norm.rms_norm_backward_kernel, rms_norm._tile(width),
                   {"dy_ptr": BF16, "x_ptr": BF16, "weight_ptr": FP32, "through_ptr": BF16, "dx_ptr": BF16,
                    "dw_ptr": FP32, "rows": INT, "x_stride": INT, "dy_stride": INT, "eps": "fp32"}, 128, D=width,
                   ADD=True)
    for width in (96, 128, 192):
        yield norm(gated_norm.gated_norm_forward_kernel, gated_norm._tile(width),
                   {"x_ptr": BF16, "gate_ptr": BF16, "weight_ptr": FP32, "y_ptr": BF16, "rows": INT, "x_stride": INT,
                    "gate_stride": INT, "eps": "fp32"}, 80, D=width)
        yield norm(gated_norm.gated_norm_backward_kernel, gated_norm._tile(width),
                   {"dy_ptr": BF16, "x_ptr": BF16, "gate_ptr": BF16, "weight_ptr": FP32, "dx_ptr": BF16,
                    "dgate_ptr": BF16, "dw_ptr": FP32, "rows": INT, "dy_stride": INT, "x_stride": INT,
                    "gate_stride": INT, "eps": "fp32"}, 128, D=width)
    shape = {"F": 5888, "ROWS": swiglu.ROWS, "COLUMNS": swiglu.COLUMNS}
    yield (swiglu.swiglu_forward_kernel, {"gate_ptr": BF16, "up_ptr": BF16, "y_ptr": BF16, "rows": INT,
                                          "gate_stride": INT, "up_stride": INT}, shape, 8, 64)
    yield (swiglu.swiglu_backward_kernel, {"dy_ptr": BF16, "gate_ptr": BF16, "up_ptr": BF16, "dgate_ptr": BF16,
                                           "dup_ptr": BF16, "rows": INT, "gate_stride": INT, "up_stride": INT,
                                           "dgate_stride": INT, "dup_stride": INT}, shape, 8, 64)
    for state, docs in ((False, False), (True, False), (False, True)):
        flags = {"C": 1536, "W": 4, "STATE": state, "DOCS": docs}
        yield (convolution.convolution_forward_kernel,
               {"x_ptr": BF16, "weight_ptr": FP32, "state_ptr": BF16, "doc_ptr": "*i64", "y_ptr": BF16, "T": INT,
                "SPAN": INT, "x_batch": LONG, "x_stride": INT, "state_batch": INT, "state_stride": INT},
               {**flags, "CHANNELS": convolution.CHANNELS}, 1, 144)
        yield (convolution.convolution_backward_kernel,
               {"dy_ptr": BF16, "x_ptr": BF16, "weight_ptr": FP32, "state_ptr": BF16, "doc_ptr": "*i64",
                "dx_ptr": BF16, "dw_ptr": FP32, "T": INT, "SPAN": INT, "x_batch": LONG, "x_stride": INT,
                "dx_batch": LONG, "dx_stride": INT, "state_batch": INT, "state_stride": INT},
               {**flags, "CHANNELS": convolution.CHANNELS}, 1, 144)
    yield (cross_entropy.cross_entropy_kernel, {"logits_ptr": BF16, "target_ptr": "*i64", "loss_ptr": FP32,
                                                "stride": INT, "z": "fp32"},
           {"V": 100_352, "BLOCK": cross_entropy.BLOCK}, 8, 168)


@pytest.mark.parametrize("kernel, types, constants, warps, limit", kernels(),
                         ids=lambda value: getattr(value, "__name__", ""))
def test_kernels_fit_a_hopper_multiprocessor(kernel, types, constants, warps, limit):
    used = compile_sm90(kernel, types, constants, warps)
    assert used["spilled"] == 0 and used["registers"] <= limit, used
