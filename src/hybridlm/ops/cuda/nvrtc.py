"""CUDA source to a kernel on this process's GPU, through the NVRTC that PyTorch ships: no nvcc, no build step.

Compiled code is kept on disk (HYBRIDLM_CACHE, else XDG_CACHE_HOME/hybridlm, else ~/.cache/hybridlm) under a hash of
the source, the options and NVRTC's version; a kernel is loaded once per device and process.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
from functools import cache
from pathlib import Path

import torch

from hybridlm.atomic import write_file
from hybridlm.errors import HybridLMError

__all__ = ["CudaError", "Kernel", "available", "load"]

_OPTIONS = ("--std=c++17", "--gpu-architecture=sm_90a")
_FUNCTION_MAX_DYNAMIC_SHARED = 8
_PROGRAMMATIC_STREAM_SERIALIZATION = 6


class CudaError(HybridLMError):
    """The CUDA driver or compiler refused."""


@cache
def _nvrtc() -> ctypes.CDLL:
    """PyTorch's own NVRTC, or the system's of the same major version."""
    major = (torch.version.cuda or "0").split(".")[0]
    packages = Path(torch.__file__).parent.parent / "nvidia"
    places = [packages / f"cu{major}/lib", packages / "cuda_nvrtc/lib", Path(torch.__file__).parent / "lib", Path()]
    for place in [str(p / f"libnvrtc.so.{major}") for p in places]:  # the last: wherever the system looks
        with contextlib.suppress(OSError):
            return ctypes.CDLL(place)
    raise CudaError(f"no libnvrtc.so.{major} beside PyTorch or on the library path: install nvidia-cuda-nvrtc")


@cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as e:
        raise CudaError(f"no CUDA driver: {e}") from None


@cache
def available() -> bool:
    """Whether there is a compiler and a driver to run what it makes."""
    try:
        _nvrtc(), _driver()
    except CudaError:
        return False
    return True


def _check(status: int, what: str) -> None:
    if status:
        name = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(name))
        raise CudaError(f"{what}: {(name.value or b'unknown error').decode()} ({status})")


def _cache_folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(os.environ.get("HYBRIDLM_CACHE") or Path(home) / "hybridlm") / "cuda"


def _compile(source: str) -> bytes:
    """Machine code for sm_90a, from the cache on disk where it was compiled before."""
    nvrtc = _nvrtc()
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    key = hashlib.sha256(repr((source, _OPTIONS, major.value, minor.value)).encode()).hexdigest()[:32]
    path = _cache_folder() / f"{key}.cubin"
    with contextlib.suppress(OSError):
        return path.read_bytes()
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None)
    options = (ctypes.c_char_p * len(_OPTIONS))(*(o.encode() for o in _OPTIONS))
    status = nvrtc.nvrtcCompileProgram(program, len(_OPTIONS), options)
    size = ctypes.c_size_t()
    if status:
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        raise CudaError(f"NVRTC could not compile a kernel:\n{log.value.decode(errors='replace')}")
    nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    code = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetCUBIN(program, code)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    with contextlib.suppress(OSError, HybridLMError):  # no cache costs a second at the next start, no more
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, code.raw)
    return code.raw


class _Attribute(ctypes.Structure):  # CUlaunchAttribute
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_int * 15)]


class _Config(ctypes.Structure):  # CUlaunchConfig
    _fields_ = [*((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z",
                                                     "shared")),
                ("stream", ctypes.c_void_p), ("attributes", ctypes.c_void_p), ("count", ctypes.c_uint)]


class Kernel:
    """A loaded kernel. Call it with a grid, the block's threads, and one ctypes structure of parameters."""

    def __init__(self, code: bytes, name: str, shared: int) -> None:
        """`shared`: bytes of dynamic shared memory a block takes."""
        torch.cuda.current_stream()  # makes PyTorch's context current
        self._module, self._function, self._shared = ctypes.c_void_p(), ctypes.c_void_p(), shared
        _check(_driver().cuModuleLoadData(ctypes.byref(self._module), code), "loading a kernel")
        _check(_driver().cuModuleGetFunction(ctypes.byref(self._function), self._module, name.encode()), name)
        _check(_driver().cuFuncSetAttribute(self._function, _FUNCTION_MAX_DYNAMIC_SHARED, shared), name)

    def __call__(self, grid: int, threads: int, parameters: ctypes.Structure, overlap: bool = False) -> None:
        """`overlap`: the kernel may start before what precedes it has ended; it waits for that itself."""
        pointer = (ctypes.c_void_p * 1)(ctypes.addressof(parameters))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        attribute = _Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, 0, 1)
        config = _Config(grid, 1, 1, threads, 1, 1, self._shared, stream, ctypes.addressof(attribute), int(overlap))
        _check(_driver().cuLaunchKernelEx(ctypes.byref(config), self._function, pointer, None), "launching a kernel")


@cache
def _load(source: str, name: str, shared: int, device: int) -> Kernel:
    with torch.cuda.device(device):
        return Kernel(_compile(source), name, shared)


def load(source: str, name: str, shared: int) -> Kernel:
    """The kernel `name` of `source` on the current device."""
    return _load(source, name, shared, torch.cuda.current_device())
