"""Souping, and stages that each begin where the last one ended."""

from __future__ import annotations

import json

import pytest
import torch
from tests.train.helpers import MICRO, corpus, losses

from hybridlm.cli import main
from hybridlm.config import HybridConfig
from hybridlm.errors import ConfigError
from hybridlm.model import HybridLM
from hybridlm.train import run
from hybridlm.train.checkpoint import read_weights
from hybridlm.train.soup import soup

torch.set_num_threads(1)
STAGES = MICRO + """
from hybridlm.train.stages import Stage
def stages():
    later = {"schedule": "linear", "lr": "5e-3", "steps": "6", "warmup": "0"}
    return [Stage("pretrain", __file__, {"steps": "8", "schedule": "cosine", "lr_end": "0.1"}),
            Stage("midtrain", __file__, {**later, "moments": "true"}, seeds=(7, 8)),
            Stage("long", __file__, {**later, "sequence": "512", "batch": "2", "rope": "drop", "packing": "whole"})]
"""


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    (folder / "mine.py").write_text(STAGES.replace("__file__", repr(str(folder / "mine.py"))))
    settings = {"data": str(corpus(folder / "data")), "out": str(folder / "out")}
    return folder, settings, run(str(folder / "mine.py"), settings)


def test_each_stage_starts_from_the_one_before(staged):
    folder, _, last = staged
    out = folder / "out"
    assert last == out / "long"
    assert losses(out / "midtrain-7")[0] < losses(out / "pretrain")[0] - 0.1
    assert losses(out / "midtrain-7") != losses(out / "midtrain-8")
    config = HybridConfig.from_pretrained(out / "long" / "hf")
    assert config.rope is None
    assert config.max_position_embeddings == 512
    assert HybridConfig.from_pretrained(out / "midtrain").rope is not None


def test_the_optimizer_goes_on_with_its_moments(staged):
    from torch.distributed.checkpoint import FileSystemReader, load

    out = staged[0] / "out"
    steps = {}
    for name, at in (("pretrain", 8), ("midtrain-7", 6), ("long", 6)):
        held = {"optimizer.model.norm.weight.step": torch.zeros(())}
        load(held, storage_reader=FileSystemReader(out / name / "checkpoints" / f"step-{at:08d}"), no_dist=True)
        steps[name] = float(held["optimizer.model.norm.weight.step"])
    assert steps == {"pretrain": 8, "midtrain-7": 14, "long": 6}


def test_the_soup_is_the_mean(staged):
    out = staged[0] / "out"
    made = HybridLM.from_pretrained(out / "midtrain").state_dict()
    parts = [read_weights(out / f"midtrain-{seed}") for seed in (7, 8)]
    for name, tensor in made.items():
        torch.testing.assert_close(tensor, (parts[0][name] + parts[1][name]) / 2, rtol=1e-6, atol=1e-7)


def test_started_again_it_does_nothing_twice(staged, capsys):
    folder, settings, _ = staged
    before = (folder / "out" / "midtrain" / "model.safetensors").stat().st_mtime_ns
    run(str(folder / "mine.py"), settings)
    told = capsys.readouterr().err
    assert told.count("done before") == 4
    assert (folder / "out" / "midtrain" / "model.safetensors").stat().st_mtime_ns == before


def test_rope_can_be_stretched(staged, tmp_path):
    folder, settings, _ = staged
    (tmp_path / "one.py").write_text(MICRO)
    run(str(tmp_path / "one.py"), {**settings, "out": str(tmp_path / "out"), "init": str(folder / "out" / "pretrain"),
                                   "tokenizer": str(folder / "out" / "pretrain" / "tokenizer"), "rope": "yarn:8",
                                   "sequence": "256", "steps": "2"})
    rope = HybridConfig.from_pretrained(tmp_path / "out" / "hf").rope
    assert (rope.yarn.factor, rope.yarn.original_max_position_embeddings) == (8.0, 32)


def test_the_command_and_its_weights(staged, tmp_path):
    out = staged[0] / "out"
    with pytest.raises(SystemExit) as done:
        main(["soup", str(out / "midtrain-7"), str(out / "midtrain-8" / "hf"), "-o", str(tmp_path / "mix"),
              "--weights", "3,1", "--dtype", "float32"])
    assert not done.value.code
    made = HybridLM.from_pretrained(tmp_path / "mix").state_dict()
    one, two = read_weights(out / "midtrain-7"), HybridLM.from_pretrained(out / "midtrain-8" / "hf").state_dict()
    name = "model.norm.weight"
    torch.testing.assert_close(made[name], 0.75 * one[name] + 0.25 * two[name].float())
    assert (tmp_path / "mix" / "tokenizer.json").exists()


def test_what_cannot_be_averaged_is_told(staged, tmp_path):
    out = staged[0] / "out"
    with pytest.raises(ConfigError, match="two checkpoints"):
        soup([out / "pretrain"], tmp_path / "x")
    with pytest.raises(ConfigError, match="another architecture"):
        soup([out / "pretrain", out / "long"], tmp_path / "x")
    with pytest.raises(ConfigError, match="exists already"):
        soup([out / "midtrain-7", out / "midtrain-8"], out / "pretrain")
    assert json.loads((out / "pretrain" / "recipe.json").read_text())["steps"] == 8


def test_a_mixture_trains_and_is_validated_by_source(staged, tmp_path):
    from hybridlm.train.recipes import find

    (tmp_path / "one.py").write_text(MICRO)
    for name in ("books", "code"):
        corpus(tmp_path / name, 40 if name == "books" else 20)
    settings = {"data": f"{tmp_path / 'books'}:0.3,{tmp_path / 'code'}:0.7", "out": str(tmp_path / "out"), "steps": "8",
                "tokenizer": str(staged[0] / "out" / "pretrain" / "tokenizer"), "repetition": "32"}
    out = run(str(tmp_path / "one.py"), settings)
    result = json.loads((out / "result.json").read_text())
    assert {"all", "books/a", "code/a"} <= set(result["val_bits_per_byte"])
    assert {p.name for p in (out / "tokens").iterdir()} == {"books", "code"}
    with pytest.raises(ConfigError, match="trained on other tokens"):
        run(str(tmp_path / "one.py"), {**settings, "data": settings["data"].replace("0.7", "0.6"), "steps": "10"})
    assert find(str(tmp_path / "one.py")).steps == 24
