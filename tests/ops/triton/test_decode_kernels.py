"""The kernels of a decoding step: their logic in the interpreter, their registers for sm_90, their numbers on a GPU."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.ops.triton import decode_cases as cases
from tests.ops.triton.offline import compile_sm90

ROOT = Path(__file__).parents[3]
BF16, F32, I64 = "*bf16", "*fp32", "*i64"


def test_logic_in_the_interpreter():
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    program = ROOT / "tests/ops/triton/interpret_decode.py"
    done = subprocess.run([sys.executable, program], capture_output=True, text=True,
                          env=environment, check=False)
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout)
    assert len(errors) > 10
    wrong = {name: error for name, error in errors.items() if not error < 3e-6}
    assert not wrong


def test_the_cases_can_fail(monkeypatch):
    from hybridlm.ops.triton import decode

    monkeypatch.setattr(decode, "gdn_decode", lambda *args, **options: None)
    assert max(cases.gdn(1, 1, 1, 4, 4).values()) > 0.1


def test_a_step_fits_into_registers():
    """No kernel of a step spills; the product's accumulators and tiles fit for every number of rows."""
    from triton import language as tl

    from hybridlm.ops.triton import decode, gemv, paged_attention

    kernel = decode._gdn_decode
    types = {**dict.fromkeys(("q", "k", "v", "a", "b", "gate", "out"), BF16),
             **dict.fromkeys(("taps_q", "taps_k", "taps_v", "ssm_a", "dt_bias", "norm"), F32),
             **dict.fromkeys(("recurrent", "conv", "positions"), I64),
             **dict.fromkeys(("stride", "taps_stride", "out_stride", "layer"), "i32"),
             **dict.fromkeys(("eps", "scale", "strength"), "fp32")}
    constants = {"HK": 30, "HV": 30, "K": 96, "V": 192, "W": 4, "K1": 64, "K2": 32, "BV": 64, "OVERLAP": True,
                 "DTYPE": tl.bfloat16}
    used = compile_sm90(kernel, types, constants, 4, ("stride", "taps_stride", "out_stride"))
    assert used["spilled"] == 0 and used["registers"] <= 200

    types = {"x": BF16, "w": BF16, "y": BF16, "parts": F32, "counters": "*i32",
             **dict.fromkeys(("rows", "N", "K", "share", "x_stride", "w_stride", "y_stride", "half"), "i32")}
    for BM, BN, BK, warps, more in ((16, 64, 256, 4, {}), (64, 32, 128, 4, {"SPLIT": 2}),
                                    (64, 64, 64, 4, {"GLU": True, "SPLIT": 2}),
                                    (128, 64, 64, 8, {"SPLIT": 4, "SERIAL": True})):
        constants = {"BM": BM, "BN": BN, "BK": BK, "SPLIT": 1, "SERIAL": False, "GLU": False, "EVEN": True,
                     "OVERLAP": True, "AHEAD": 8, **more}
        aligned = ("N", "K", "share", "x_stride", "w_stride", "y_stride", "half")
        used = compile_sm90(gemv._skinny, types, constants, warps, aligned, num_stages=3)
        assert used["spilled"] == 0 and used["registers"] <= 200 and used["shared"] <= 227 << 10, (constants, used)

    types = {"q": BF16, "out": BF16, "tables": I64, "positions": I64, "parts": F32, "counters": "*i32",
             **dict.fromkeys(("q_stride", "out_stride", "layer", "window"), "i32"), "scale": "fp32"}
    constants = {"HKV": 30, "GROUP": 1, "D": 128, "BG": 16, "BD": 128, "SPLIT": 16,
                 "DTYPE": tl.bfloat16, "OVERLAP": True}
    used = compile_sm90(paged_attention._decode_attention, types, constants, 4, ("q_stride", "out_stride"))
    assert used["spilled"] == 0 and used["registers"] <= 128


def test_the_cuda_step_compiles_without_spills(tmp_path):
    """With the toolkit's compiler, where there is one; at run time NVRTC does it."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc here")
    from hybridlm.ops.cuda import decode

    source = Path(decode.__file__).parent / "decode.cu"
    for HK, HV, K, V, narrow in ((30, 30, 96, 192, 1), (4, 8, 128, 128, 1), (2, 4, 48, 96, 0)):
        sizes = {"HK": HK, "HV": HV, "K": K, "V": V, "W": 4, "HALVES": decode.halves_for(K, V), "STAGES": 2,
                 "BULK": 1, "BF16": narrow}
        done = subprocess.run([nvcc, "-std=c++17", "-arch=sm_90a", "-cubin", "-o", tmp_path / "x.cubin", "-Xptxas",
                               "-v",
                               *(f"-D{name}={value}" for name, value in sizes.items()), source],
                              capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "0 bytes spill stores" in done.stderr, done.stderr


def test_which_sizes_the_cuda_step_takes():
    from hybridlm.ops.cuda import decode

    assert decode.halves_for(96, 192) == 2
    assert decode.halves_for(12, 24) is None and decode.halves_for(98, 192) is None
    for K, V in ((48, 96), (64, 128), (128, 128), (96, 192), (64, 64)):
        halves = decode.halves_for(K, V)
        assert halves is not None and K % (4 * halves) == 0 and V // 32 * halves <= 12


@pytest.mark.gpu
def test_numbers_on_a_gpu():
    from hybridlm.ops.cuda import decode as native
    from hybridlm.ops.triton import decode

    options = {"dtype": torch.bfloat16, "device": "cuda"}
    for step in (decode.gdn_decode, native.gdn_decode):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decode, "gdn_decode", lambda *a, num_warps=None, step=step, **k: step(*a, **k))
            assert max(cases.gdn(40, 30, 30, 96, 192, **options).values()) < 3e-3
            assert max(cases.gdn(3, 2, 4, 48, 96, device="cuda").values()) < 1e-6
    for case in (cases.linear(3, 1000, 512, **options), cases.linear(3, 1000, 1024, split=4, **options),
                 cases.linear(200, 1000, 1024, split=2, **options), cases.linear(9, 1000, 1000, glu=True, **options),
                 *cases.paged([1, 70, 200, 64, 5000], 30, 30, 128, **options).values(),
                 *cases.paged([1, 70, 200, 64], 4, 2, 32, window=70, **options).values(),
                 cases.add_norm(3, 3840, **options)):
        assert case < 5e-3


@pytest.mark.gpu
@pytest.mark.parametrize("form", [{"block": (64, 256)}, {"block": (64, 128), "split": 2},
                                  {"block": (64, 128), "glu": True}])
def test_a_product_does_not_depend_on_its_company(form):
    assert all(cases.same_in_any_company(1000, 3840, dtype=torch.bfloat16, device="cuda", **form))
