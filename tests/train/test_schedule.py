"""WSD-S and the ladder's rules; that a run of several decays gives the points that `hybridlm scaling` reads."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from tests.train.helpers import corpus, micro

from hybridlm.errors import ConfigError
from hybridlm.scaling.runs import decay_ends as read_ends
from hybridlm.scaling.runs import gather, read_run
from hybridlm.train import run
from hybridlm.train.recipes import find
from hybridlm.train.recipes.ladder import ladder
from hybridlm.train.schedule import decay_ends, learning_rate


def test_wsds_falls_at_each_multiple_and_comes_back():
    recipe = replace(ladder("60m", multiples=(0.5, 1, 2)), lr=1.0)
    weights = recipe.model.num_parameters(embedding=False)
    ends = decay_ends(recipe)
    assert ends[-1] == recipe.steps
    for end, multiple in zip(ends, (0.5, 1, 2), strict=True):
        assert end * recipe.tokens_per_step == pytest.approx(multiple * 20 * weights, rel=1e-3)
    rates = [learning_rate(recipe, s, s / recipe.steps) for s in range(recipe.steps)]
    begin = recipe.warmup
    for end in ends:
        length = round(recipe.decay * (end - (0 if begin == recipe.warmup else begin)))
        assert rates[begin:end - length] == [1.0] * (end - length - begin)
        assert rates[end - 1] == pytest.approx(1 / length)
        assert all(a > b for a, b in zip(rates[end - length:end - 1], rates[end - length + 1:end], strict=True))
        begin = end


def test_the_ladders_rules_in_its_own_figures():
    """Peak rate and batch of the ladder's scripts at its own N, as noted from them."""
    from hybridlm.train.schedule import ladder_batch, ladder_rate

    for weights, rate, tokens in ((57.4e6, 2.9e-3, 0.215e6), (190.4e6, 1.95e-3, 0.478e6), (1.279e9, 1.03e-3, 1.70e6)):
        assert ladder_rate(int(weights)) == pytest.approx(rate, rel=0.01)
        assert ladder_batch(int(weights), 4096) * 4096 == pytest.approx(tokens, rel=0.08)


def test_a_run_of_several_decays_is_read_as_points(tmp_path):
    recipe = find(micro(tmp_path))
    unit = 20 * recipe.model.with_(vocab_size=384).num_parameters(embedding=False) / recipe.tokens_per_step
    out = run(micro(tmp_path), {"data": str(corpus(tmp_path / "data")), "out": str(tmp_path / "out"), "steps": "40",
                                "schedule": "wsds", "decays": f"{10 / unit},{20 / unit}", "decay": "0.5",
                                "val_every": "1000", "warmup": "2"})
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "val_bits_per_byte" in r] == [10, 20, 40]
    assert json.loads((out / "recipe.json").read_text())["unique_tokens"] > 1000
    held = read_run(out)
    assert [rows[i]["step"] for i in read_ends(held)] == [10, 20, 40]
    gathered = gather([out])
    assert [p.tokens for p in gathered.points] == [s * recipe.tokens_per_step for s in (10, 20, 40)]
    assert not gathered.notes


@pytest.mark.parametrize(("settings", "told"), [
    ({"schedule": "wsds"}, "^decays: must be given"),
    ({"schedule": "wsds", "decays": "1,x"}, "^decays: must be numbers"),
    ({"decays": "0,1"}, "^decays: must be positive"), ({"rope": "yarn"}, "^rope: must be drop or yarn:FACTOR"),
    ({"schedule": "wsds", "decays": "1", "seconds": "9"}, "^schedule: wsds counts steps"),
    ({"moments": "true"}, "^moments: needs init"), ({"recompute": "2"}, "^recompute: must be between"),
])
def test_what_does_not_go_together(settings, told):
    with pytest.raises(ConfigError, match=told):
        find("tiny").override(settings)
