"""Recipes: all can be made, overrides parse by type, and what is wrong is told in one line that names the setting."""

from __future__ import annotations

from itertools import pairwise

import pytest
from tests.train.helpers import micro

from hybridlm.errors import ConfigError
from hybridlm.train.recipes import RECIPES, find
from hybridlm.train.schedule import learning_rate


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_can_be_made_and_written_down(name):
    recipe = find(name)
    assert recipe.name == name
    assert recipe.to_dict()["model"]["hidden_size"] == recipe.model.hidden_size
    assert recipe.tokens_per_step >= 4096 or name == "tiny"


def test_a_twin_trains_as_its_sibling_does():
    one, two = find("60m"), find("60m-twin")
    assert (one.steps, one.batch, one.lr) == (two.steps, two.batch, two.lr)
    assert "linear_attention" not in two.model.layer_types


def test_overrides_take_the_type_of_the_setting():
    recipe = find("tiny").override({"steps": "1e3", "lr": "2e-3", "compile": "yes", "data": "1", "batch": "1_6",
                                    "seed": "0", "model.hidden_size": "64", "model.rms_norm_eps": "1e-5"})
    assert (recipe.steps, recipe.lr, recipe.compile, recipe.data, recipe.batch) == (1000, 2e-3, True, "1", 16)
    assert (recipe.model.hidden_size, recipe.model.rms_norm_eps) == (64, 1e-5)


@pytest.mark.parametrize(("settings", "told"), [
    ({"stesp": "3"}, "stesp: .*did you mean steps"),
    ({"xyzzy": "3"}, "xyzzy: not a setting of recipe tiny"),
    ({"model": "3"}, "model: not a setting"),
    ({"steps": "many"}, "steps: must be a number, not 'many'"),
    ({"steps": "1.5"}, "steps: must be a whole number"),
    ({"steps": "inf"}, "steps: must be a whole number"),
    ({"steps": "0"}, "steps: must be positive"),
    ({"batch": "-1"}, "batch: must be positive"),
    ({"lr": "nan"}, "lr: must be positive"),
    ({"lr": "inf"}, "lr: must be positive"),
    ({"decay": "1.5"}, "decay: must be between"),
    ({"beta2": "1"}, "beta2: must be"),
    ({"compile": "maybe"}, "compile: must be true or false"),
    ({"dtype": "fp8"}, "dtype: must be one of float32, bfloat16"),
    ({"schedule": "step"}, "schedule: must be one of"),
    ({"microbatch": "3"}, "microbatch: 3 sequences do not divide batch"),
    ({"sequence": "4096"}, "sequence: 4096 tokens are more than"),
    ({"model.layer_types": "x"}, "model.layer_types: not a number"),
    ({"model.depth": "3"}, "model.depth: not a number"),
    ({"model.num_attention_heads": "7"}, "num_attention_heads: 7 heads do not divide"),
])
def test_what_is_wrong_is_named(settings, told):
    with pytest.raises(ConfigError, match=f"^{told}") as caught:
        find("tiny").override(settings)
    assert "\n" not in str(caught.value)


def test_unknown_recipes_and_broken_files(tmp_path):
    with pytest.raises(ConfigError, match="'tyni' is unknown; known are tiny"):
        find("tyni")
    with pytest.raises(ConfigError, match="no such recipe file"):
        find(str(tmp_path / "absent.py"))
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ConfigError, match="defines no function recipe"):
        find(str(tmp_path / "empty.py"))
    (tmp_path / "wrong.py").write_text("def recipe():\n    return 3\n")
    with pytest.raises(ConfigError, match="returned int"):
        find(str(tmp_path / "wrong.py"))
    assert find(micro(tmp_path)).steps == 24


def test_what_to_read_and_where_to_write_must_be_said(tmp_path):
    with pytest.raises(ConfigError, match=r"^data: missing"):
        find("tiny").ready()
    with pytest.raises(ConfigError, match=r"^out: missing"):
        find("tiny").override({"data": "x"}).ready()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"^out: .*is a file"):
        find("tiny").override({"data": "x", "out": str(tmp_path / "file")}).ready()


@pytest.mark.parametrize("schedule", ["wsd", "cosine", "linear"])
def test_schedules_warm_up_and_end_where_they_say(schedule):
    recipe = find("tiny").override({"schedule": schedule, "lr": "1", "warmup": "10", "decay": "0.25", "lr_end": "0.1"})
    rates = [learning_rate(recipe, s, s / 100) for s in range(101)]
    assert rates[0] == pytest.approx(0.1, rel=0.02)
    assert rates[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(rates[10:]))
    if schedule == "wsd":
        assert rates[10:75] == [1.0] * 65
        assert rates[88] == pytest.approx(0.1 + 0.9 * 12 / 25)
    else:
        assert rates[50] == pytest.approx(0.55)
