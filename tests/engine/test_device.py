"""What "cpu", "cuda" and "auto" come to, on machines with and without a GPU and its packages."""

import subprocess
import sys

import pytest

from hybridlm.engine import device
from hybridlm.errors import HybridLMError


def test_named_devices_are_taken_as_they_are():
    assert device.choose("cpu") == "cpu" and device.kind_of("cpu") == "cpu"


@pytest.mark.parametrize("name", ["tpu", "", "cuda:x", "cuda:-1", "cpu:1", "Cuda"])
def test_unknown_ones_are_refused(name):
    with pytest.raises(HybridLMError, match="use cpu, cuda"):
        device.choose(name)


@pytest.mark.parametrize("gpus, missing, chosen", [(1, None, "cuda"), (2, None, "cuda"), (0, None, "cpu"),
                                                   (1, "torch", "cpu"), (1, "triton", "cpu")])
def test_auto(monkeypatch, gpus, missing, chosen):
    monkeypatch.setattr(device, "_gpus", lambda: gpus)
    monkeypatch.setattr(device, "find_spec", lambda name: None if name == missing else object())
    assert device.choose("auto") == chosen


def test_a_gpu_without_its_packages_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(device, "find_spec", lambda name: None if name == "triton" else object())
    with pytest.raises(HybridLMError, match="triton, which is not installed"):
        device.choose("cuda:1")
    monkeypatch.setattr(device, "find_spec", lambda name: object())
    assert device.choose("cuda:1") == "cuda:1" and device.kind_of("cuda:1") == "cuda"


def test_without_a_driver_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(device, "_LIBRARIES", ("libabsent.so.9",))
    assert device._gpus() == 0


def test_finding_out_does_not_import_torch():
    code = "import sys; from hybridlm.engine.device import choose; choose('auto'); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
