"""The compiled kernels of the CPU runtime; `_native.pyi` says what each does."""

from hybridlm.native._native import *  # noqa: F403
