"""The guard beside its definition in NumPy, and what it does in a run."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from tests.train.helpers import corpus, micro

from hybridlm.train import run
from hybridlm.train.guard import Guard
from hybridlm.train.trainer import Trainer


def skipped(losses, norms, window, sigma):
    """The definition: mean and deviation of the last `window` finite batches before."""
    out, held = [], []
    for loss, norm in zip(losses, norms, strict=True):
        bad = not (math.isfinite(loss) and math.isfinite(norm))
        last = np.array(held[-window:])
        if not bad and len(held) >= max(2, window // 2):
            bad = bool(((loss, norm) > last.mean(0) + sigma * last.std(0, ddof=1)).any())
        if math.isfinite(loss) and math.isfinite(norm):
            held.append((loss, norm))
        out.append(bad)
    return out


@pytest.mark.parametrize("seed", range(5))
def test_against_the_definition(seed):
    rng = np.random.default_rng(seed)
    losses = (3 + 0.1 * rng.standard_normal(200)).astype(np.float32)
    norms = (1 + 0.1 * rng.standard_normal(200)).astype(np.float32)
    losses[[3, 40, 90, 91]] = [9, 5, np.nan, 8]
    norms[[60, 120]] = [np.inf, 4]
    guard = Guard(16, 6.0, torch.device("cpu"))
    found = []
    for at, (loss, norm) in enumerate(zip(losses.tolist(), norms.tolist(), strict=True)):
        if at == 77:  # through a checkpoint
            state, guard = json.loads(json.dumps(guard.state())), Guard(16, 6.0, torch.device("cpu"))
            guard.load(state)
        found.append(bool(guard.judge(torch.tensor(loss), torch.tensor(norm))))
    assert found == skipped(losses.tolist(), norms.tolist(), 16, 6.0)
    assert sum(found) >= 5


def test_without_sigma_only_what_is_no_number():
    guard = Guard(4, 0.0, torch.device("cpu"))
    found = [bool(guard.judge(torch.tensor(x), torch.tensor(1.0))) for x in (1.0, 1.0, 1.0, 99.0, math.nan)]
    assert found == [False] * 4 + [True]


def test_a_poisoned_batch_is_left_out_and_the_run_goes_on(tmp_path, monkeypatch):
    whole = Trainer.loss

    def poisoned(self, *piece):
        return whole(self, *piece) * (float("nan") if self.step == 9 else 1)

    monkeypatch.setattr(Trainer, "loss", poisoned)
    out = run(micro(tmp_path), {"data": str(corpus(tmp_path / "data")), "out": str(tmp_path / "out")})
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if r.get("skipped")] == [10]
    assert len(rows) == 24
    assert math.isfinite(rows[-1]["loss"])
    assert rows[-1]["loss"] < rows[0]["loss"]
    events = [json.loads(line) for line in (out / "events" / "rank-00000.jsonl").read_text().split("\n") if line]
    assert [e["step"] for e in events if e["kind"] == "skip"] == [10]
