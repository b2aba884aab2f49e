"""Which device an engine runs on: what was asked for, checked, or what "auto" finds.

Finding out does not import PyTorch: the driver is asked itself, so machines without a GPU start as quickly as ever.
"""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from importlib.util import find_spec

from hybridlm.errors import HybridLMError

__all__ = ["choose", "kind_of"]

_LIBRARIES = ("nvcuda.dll",) if sys.platform == "win32" else ("libcuda.so.1",)


def choose(device: str) -> str:
    """"cpu", "cuda" or "cuda:1" as they are; for "auto" a GPU where there is one that can be used, else "cpu"."""
    if device != "auto":
        kind_of(device)
        return device
    return "cuda" if not _missing() and _gpus() else "cpu"


def kind_of(device: str) -> str:
    """"cpu" or "cuda". Raises `HybridLMError` for anything else, and for a GPU without the packages it needs."""
    kind, _, index = str(device).partition(":")
    if kind not in ("cpu", "cuda") or (index and not (kind == "cuda" and index.isdecimal())):
        raise HybridLMError(f"device: {device!r} is unknown; use cpu, cuda (or cuda:1) or auto")
    if kind == "cuda" and (missing := _missing()):
        raise HybridLMError(f'device: a GPU needs {missing}, which is not installed; pip install "hybridlm[gpu]"')
    return kind


def _missing() -> str | None:
    return next((name for name in ("torch", "triton") if find_spec(name) is None), None)


def _gpus() -> int:
    """CUDA devices that the driver shows this process; 0 without a driver."""
    for library in _LIBRARIES:
        with suppress(OSError, AttributeError):
            driver, count = ctypes.CDLL(library), ctypes.c_int(0)
            if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0:
                return count.value
    return 0
