"""Fresh random inputs in every run; a failing test shows the seed, and HYBRIDLM_TEST_SEED repeats it."""

from __future__ import annotations

import os

import numpy as np
import pytest


@pytest.fixture
def rng() -> np.random.Generator:
    seed = int(os.environ.get("HYBRIDLM_TEST_SEED") or int.from_bytes(os.urandom(4), "little"))
    print(f"HYBRIDLM_TEST_SEED={seed}")
    return np.random.default_rng(seed)
