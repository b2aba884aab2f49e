"""Plans against counts made by hand, against the weights of real tensors, and against measured figures."""

import json
import math
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest

from hybridlm.cli import main
from hybridlm.config import FULL, SLIDING, HybridConfig
from hybridlm.errors import ConfigError
from hybridlm.formats.names import specs
from hybridlm.plan import Cluster, Layout, find_gpu, flops_per_token, make_plan, memory
from hybridlm.plan.memory import _matrices
from hybridlm.plan.published import PUBLISHED, compare
from hybridlm.plan.run import FILLED, layouts

DOCS = Path(__file__).parents[2] / "docs"
SEVEN = HybridConfig.preset("7b")


def test_flops_of_the_7b_by_hand():
    f = flops_per_token(SEVEN, 8192)
    # one Gated DeltaNet layer: q, k of 2880, v, gate and output of 5760, a and b of 30; one attention layer: 4 d^2
    gdn, attention = 3840 * (2 * 2880 + 3 * 5760 + 2 * 30), 4 * 3840 * 3840
    assert f.mixers == 2 * (24 * gdn + 8 * attention)
    assert f.mlp == 2 * 32 * 3 * 3840 * 11_008
    assert f.head == 2 * 100_352 * 3840
    assert f.recurrence == 24 * 8 * 30 * 96 * 192
    assert f.attention == 8 * 4 * 3840 * (8192 + 1) / 2  # a query sees 1, 2, ..., 8192 keys
    assert f.convolution == 24 * 2 * 4 * (2880 + 2880 + 5760)
    assert f.forward == pytest.approx(14.70e9, rel=1e-3) and f.training == 3 * f.forward


def test_a_window_counts_what_it_sees():
    config = HybridConfig(vocab_size=64, hidden_size=32, intermediate_size=64, layer_types=(SLIDING, FULL),
                          num_attention_heads=4, sliding_window=5, max_position_embeddings=64)
    seen = sum(min(i + 1, 5) for i in range(12)) / 12 + sum(i + 1 for i in range(12)) / 12
    assert flops_per_token(config, 12).attention == pytest.approx(4 * 32 * seen)


@pytest.mark.parametrize("name", ["tiny", "190m", "1b", "7b", "1b-twin", "olmo3-7b"])
def test_matrices_are_those_of_the_model(name):
    config = HybridConfig.preset(name)
    real = sum(math.prod(s.shape) for s in specs(config) if s.matrix and "layers" in s.name and "conv" not in s.name)
    assert sum(_matrices(config, kind) for kind in config.layer_types) == real


def test_memory_by_hand_and_by_layout():
    n = SEVEN.num_parameters()
    one = memory(SEVEN, Layout(), sequence=8192)
    assert (one.weights, one.gradients, one.optimizer) == (4 * n, 4 * n, 8 * n)
    assert one.logits == 2 * 8192 * 100_352 + 4 * 100_352 * 3840
    sharded = memory(SEVEN, Layout(dp_replicate=4, dp_shard=128), sequence=8192)
    assert sharded.weights == pytest.approx(4 * n / 128) and sharded.optimizer == pytest.approx(8 * n / 128)
    assert sharded.activations == one.activations
    assert memory(SEVEN, Layout(cp=4), sequence=8192).activations == one.activations / 4
    two = memory(SEVEN, Layout(tp=2), sequence=8192)
    tables = 2 * 100_352 * 3840
    assert two.weights == pytest.approx(4 * ((n - tables) / 2 + tables), rel=1e-3)
    assert one.activations / 2 < two.activations < one.activations
    four = memory(SEVEN, Layout(tp=4), sequence=8192)  # 30 heads on 4 ranks: the fullest has 8
    assert four.activations > two.activations / 2
    assert memory(SEVEN, Layout(), sequence=8192, recompute=1.0).activations == 2 * 3840 * 32 * 8192
    half = memory(SEVEN, Layout(), sequence=8192, recompute=0.5).activations
    assert memory(SEVEN, Layout(), sequence=8192, recompute=1.0).activations < half < one.activations
    assert memory(SEVEN, Layout(), sequence=8192, optimizer="muon").optimizer < 5 * n


@pytest.mark.parametrize(("row", "name", "microbatch"), [
    ("| 1b | 16 x 8,192 in microbatches of 2 |", "1b", 2), ("| 190m | 16 x 8,192 in microbatches of 4 |", "190m", 4)])
def test_memory_is_near_the_measured_peaks(row, name, microbatch):
    """Peaks that PyTorch allocated on an H200, from docs/performance-gpu.md; its context is not among them."""
    (line,) = [x for x in (DOCS / "performance-gpu.md").read_text(encoding="utf-8").splitlines() if x.startswith(row)]
    (peak,) = re.findall(r"([\d.]+) GB", line)
    m = memory(HybridConfig.preset(name), Layout(), sequence=8192, microbatch=microbatch)
    assert m.total - m.reserve == pytest.approx(1e9 * float(peak), rel=0.2)


def test_speed_without_communication_is_mfu_times_peak():
    cluster = Cluster(find_gpu("h200"), 1, mtbf_hours=0)
    plan = make_plan(HybridConfig.preset("1b"), cluster, 1e9, batch_tokens=131_072, mfu=0.5)
    expected = 0.5 * 989e12 / flops_per_token(HybridConfig.preset("1b"), 8192).training
    assert plan.chosen.tokens_per_s == pytest.approx(expected) and plan.outcome.goodput == 1
    assert plan.days == pytest.approx(1e9 / expected / 86_400) and plan.chosen.recompute == 0
    costly = replace(plan, cluster=replace(cluster, price=3.0))
    assert costly.cost == pytest.approx(3 * 24 * plan.days)


def test_measured_step_is_predicted():
    """The 1b in microbatches of 2 took 2,146.7 ms a step of 16 x 8,192 tokens on an H200."""
    plan = make_plan(HybridConfig.preset("1b"), Cluster(find_gpu("h200"), 1), 1e9, batch_tokens=16 * 8192)
    assert plan.chosen.seconds == pytest.approx(2.1467, rel=0.01)


def test_recomputing_costs_time_and_saves_memory():
    cluster = Cluster(find_gpu("h200"), 8)
    shape = {"layout": Layout(dp_shard=8), "microbatch": 1}
    none, all_ = (make_plan(SEVEN, cluster, 1e9, recompute=r, **shape).chosen for r in (0.0, 1.0))
    assert all_.memory.total < none.memory.total
    assert all_.compute / none.compute == pytest.approx((4 * 14.70 - 0.77) / (3 * 14.70), rel=1e-3)


def test_layouts_use_all_gpus_and_a_node_at_most():
    found = list(layouts(SEVEN, 24))
    assert all(x.gpus == 24 and x.tp <= 8 for x in found)
    assert Layout(1, 24, 1, 1) in found and Layout(3, 1, 8, 1) in found and len(set(found)) == len(found)


def test_the_fastest_that_fits_is_chosen():
    plan = make_plan(SEVEN, Cluster(find_gpu("h100"), 512), 3e12)
    limit = FILLED * 80e9
    fitting = [s for s in plan.choices if s.memory.total <= limit]
    assert plan.chosen.memory.total <= limit and plan.chosen.seconds == min(s.seconds for s in fitting)
    assert plan.chosen.tokens == 4_194_304


@pytest.mark.parametrize(("arguments", "words"), [
    ({"layout": Layout(dp_shard=4)}, "is for 4 GPUs, not 8"),
    ({"batch_tokens": 3 * 8192, "layout": Layout(dp_shard=8)}, "do not divide"),
    ({"sequence": 131_072, "batch_tokens": 8 * 131_072}, "max_position_embeddings"),
    ({"layout": Layout(dp_replicate=8), "recompute": 1.0}, "GB a GPU"),
    ({"optimizer": "sgd"}, "optimizer"),
])
def test_what_cannot_be_says_why(arguments, words):
    with pytest.raises(ConfigError, match=words):
        make_plan(SEVEN, Cluster(find_gpu("h100"), 8), 1e9, **arguments)
    with pytest.raises(ConfigError, match="known are a100"):
        find_gpu("tpu")


def test_the_published_run():
    ours, theirs, rows, why = compare()
    assert PUBLISHED.tokens_per_s == pytest.approx(5.61e6, rel=1e-3)  # 3e12 / (6.19 * 86,400)
    assert theirs.mfu == pytest.approx(5.609e6 * 44.1e9 / (512 * 2250e12), rel=1e-3)
    assert theirs.chosen.tokens_per_s == pytest.approx(PUBLISHED.tokens_per_s, rel=1e-3)
    assert theirs.days == pytest.approx(6.19, rel=0.01) and ours.days < theirs.days
    assert ours.chosen.layout == PUBLISHED.layout and ours.chosen.tokens == PUBLISHED.batch_tokens
    assert {r[0] for r in rows} >= {"tokens/s", "days", "active share", "recovery, median"} and len(why) >= 4


def test_the_command_tells_everything_it_assumes(capsys):
    with pytest.raises(SystemExit) as done:
        main(["plan", "--preset", "190m", "--gpus", "8", "--tokens", "4e9", "--batch-tokens", "524288", "--price", "2"])
    out = capsys.readouterr().out
    assert done.value.code == 0
    for words in ("GFLOP a token", "does not" if "does not fit" in out else "tokens/s", "Memory of", "Goodput", "Cost:",
                  "Assumed:", "MFU:", "Failures:", "Links:", "Checkpoints:", "at 2 each"):
        assert words in out
    with pytest.raises(SystemExit):
        main(["plan", "--preset", "190m", "--gpus", "8", "--tokens", "4e9", "--batch-tokens", "524288", "--mtbf", "0",
              "--layout", "dp_shard=4,dp_replicate=2", "--json"])
    data = json.loads(capsys.readouterr().out)
    assert data["step"]["layout"] == {"dp_replicate": 2, "dp_shard": 4, "tp": 1, "cp": 1}
    assert data["faults"]["mtbf"] is None and data["outcome"]["goodput"] == 1
    with pytest.raises(SystemExit) as done:
        main(["plan", "--layout", "pp=2"])
    assert done.value.code == 2
    with pytest.raises(SystemExit):
        main(["plan", "--published"])
    assert "512 B200" in capsys.readouterr().out


def test_every_part_of_memory_is_told():
    from hybridlm.plan.memory import Memory
    from hybridlm.plan.text import _PARTS

    assert set(_PARTS) == {f.name for f in fields(Memory)}
