"""Loss and gradients on 2, 3, 4 and 8 processes are those of one."""

from __future__ import annotations

import pytest
import torch
from tests.train_parallel.cases import config, run

from hybridlm.errors import ConfigError
from hybridlm.model import HybridLM
from hybridlm.train.parallel import Layout, Parallel
from hybridlm.train.parallel.exchange import shares

PIECES = {"pieces": 2}
TWO = [
    ("replicas", Layout(2), {}, PIECES),
    ("fsdp", Layout(1, 2), {"tied": True}, PIECES),
    ("tensor", Layout(tensor=2), {"kv": 3}, {}),
    ("context", Layout(context=2), {}, {}),
]
THREE = [
    ("replicas", Layout(3), {}, {"rows": 3}),
    ("fsdp", Layout(1, 3), {}, {"rows": 3, "recompute": 1.0}),
    ("tensor, uneven", Layout(tensor=3), {"heads": 4, "kv": 2, "value": 2}, {}),
    ("context", Layout(context=3), {"window": 20}, {"recompute": 0.5}),
    ("context, one document", Layout(context=3), {"rope": False}, {"documents": False}),
]
FOUR = [
    ("replicas", Layout(4), {}, {}),
    ("hsdp", Layout(2, 2), {}, {"rows": 8, **PIECES}),
    ("fsdp", Layout(1, 4), {}, {}),
    ("30 heads, 4 ways", Layout(tensor=4), {"heads": 30}, {"rows": 1}),
    ("tensor x context, float64", Layout(tensor=2, context=2), {"heads": 5}, {"rows": 1, "dtype": torch.float64}),
    ("context", Layout(context=4), {}, {"rows": 4}),
    ("fsdp x tensor", Layout(1, 2, tensor=2), {"heads": 5}, PIECES),
    ("fsdp x context", Layout(1, 2, context=2), {}, {"recompute": 1.0}),
    ("tensor x context", Layout(tensor=2, context=2), {"heads": 5, "value": 2}, {}),
    ("replicas x context", Layout(2, context=2), {}, PIECES),
    ("replicas x tensor", Layout(2, tensor=2), {}, {}),
]
EIGHT = [
    ("30 heads, 8 ways", Layout(tensor=8), {"heads": 30}, {"rows": 1}),
    ("30 heads, 8 ways, float64", Layout(tensor=8), {"heads": 30}, {"rows": 1, "dtype": torch.float64}),
    ("all", Layout(1, 2, tensor=2, context=2), {}, {}),
    ("context", Layout(context=8), {"heads": 8}, {"rows": 4}),
]


@pytest.mark.parametrize(("world", "cases"), [(2, TWO), (3, THREE), (4, FOUR),
                                              pytest.param(8, EIGHT, marks=pytest.mark.slow)])
def test_many_processes_are_one(world, cases, tmp_path):
    found = run(world, tmp_path, cases)
    print(found)
    for name, worst in found.items():
        assert not isinstance(worst, str), f"{name}: {worst}"
        assert worst < 1e-5, f"{name}: {worst}"


def test_heads_are_divided_evenly():
    assert shares(30, 4) == [(0, 8), (8, 16), (16, 23), (23, 30)]
    assert [b - a for a, b in shares(30, 8)] == [4] * 6 + [3] * 2
    assert shares(3, 3) == [(0, 1), (1, 2), (2, 3)]


def test_layouts_that_do_not_fit_are_refused():
    assert Layout(0, 2).of(8) == Layout(4, 2)
    for layout, world in ((Layout(2), 3), (Layout(0, 2), 3), (Layout(0, 4), 2), (Layout(1, 0), 1)):
        with pytest.raises(ConfigError, match="dp_shard"):
            layout.of(world)


def test_one_process_needs_no_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    parallel = Parallel.start(Layout(0), torch.device("cpu"))
    model = HybridLM(config())
    parallel.apply(model, compute_dtype=None, recompute=0.0, compile=False)
    with parallel.accumulate(model, last=True):
        model.hidden(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
    assert parallel.clip(model.parameters(), 0) > 0
    assert parallel.agree(True) and not parallel.agree(False)
    assert not torch.distributed.is_initialized()
    parallel.stop()
