"""The Triton kernels of the gated delta rule without a GPU: what they compute, in Triton's interpreter, and what they
take of a Hopper multiprocessor, compiled offline."""

import json
import subprocess
import sys
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
