"""What a run leaves about itself, and that it suffices: sinks, provenance, running again, export, hub models."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tests.store.hub_server import HubServer
from tests.train.helpers import corpus, losses, micro

from hybridlm.cli import main
from hybridlm.engine import Engine
from hybridlm.errors import ConfigError, DataError
from hybridlm.model import HybridLM
from hybridlm.train import run
from hybridlm.train.metrics import Metrics
from hybridlm.train.provenance import git_revision, read_recipe
from hybridlm.train.recipes import find
from hybridlm.train.sinks import JsonLines, load_sink


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """(recipe file, text, run folder) of a micro run of 12 steps."""
    folder = tmp_path_factory.mktemp("first")
    recipe, data = micro(folder), corpus(folder / "data")
    out = run(recipe, {"data": str(data), "out": str(folder / "out"), "steps": "12"})
    return recipe, data, out


def test_the_folder_tells_where_the_run_came_from(first):
    _, data, out = first
    held = json.loads((out / "recipe.json").read_text())
    assert held["steps"] == 12 and held["data"] == str(data) and held["model"]["hidden_size"] == 16
    assert held["versions"]["torch"] == torch.__version__
    tokens = json.loads((out / "tokens" / "manifest.json").read_text())
    assert held["data_fingerprints"]["tokens"]["content"] == tokens["content"]
    (start,) = [json.loads(line) for line in (out / "starts.jsonl").read_text().splitlines()]
    assert start["processes"] == 1 and start["time"].endswith("Z")
    assert list((out / "events").glob("rank-*.jsonl"))


def test_run_again_from_the_folder_alone_it_is_the_same(first, tmp_path):
    _, _, out = first
    copy = tmp_path / "published"
    shutil.copytree(out, copy)
    shutil.rmtree(copy / "checkpoints")
    again = run(str(copy), {"out": str(tmp_path / "again")})
    assert losses(again) == losses(out)
    assert (again / "hf" / "model.safetensors").read_bytes() == (out / "hf" / "model.safetensors").read_bytes()
    held = [json.loads((o / "recipe.json").read_text()) for o in (out, again)]
    assert held[0]["data_fingerprints"] == held[1]["data_fingerprints"]
    assert {k for k in held[0] if held[0][k] != held[1][k]} <= {"out", "tokenizer"}


def test_from_on_the_command_line(first, tmp_path, capsys):
    with pytest.raises(SystemExit) as done:
        main(["train", "--from", str(first[2]), f"out={tmp_path / 'again'}", "steps=3", "decay=0"])
    assert done.value.code == 0, capsys.readouterr().err
    assert losses(tmp_path / "again")[:2] == losses(first[2])[:2]
    with pytest.raises(ConfigError, match="out: missing"):
        run(str(first[2]))


@pytest.mark.parametrize(("change", "told"), [
    (lambda d: d.pop("model"), "cannot be read"), (lambda d: d.update(warp=9), "warp: not a setting of this version")])
def test_a_recipe_that_cannot_be_run_again(first, tmp_path, change, told):
    held = json.loads((first[2] / "recipe.json").read_text())
    change(held)
    (tmp_path / "recipe.json").write_text(json.dumps(held))
    with pytest.raises((ConfigError, DataError), match=told):
        read_recipe(tmp_path)


def test_git_revision(tmp_path):
    assert git_revision(tmp_path) == ""
    assert len(git_revision(Path(__file__).parent).rstrip("+")) in (0, 40)


SINK = """
import json
class Mine:
    def __init__(self, out, recipe):
        self.file = (out / "mine.txt").open("a")
        self.file.write(str(recipe["batch"]) + "\\n")
    def write(self, record):
        if record["step"] == 5:
            raise OSError("the other side hung up")
        self.file.write(json.dumps(record) + "\\n")
    def close(self):
        self.file.write("closed\\n")
        self.file.close()
make = Mine
"""


def test_a_sink_of_ones_own_and_one_that_fails(first, tmp_path, capsys):
    recipe, data, out = first
    (tmp_path / "mine.py").write_text(SINK)
    other = run(recipe, {"data": str(data), "out": str(tmp_path / "out"), "steps": "12",
                         "sinks": f"{tmp_path / 'mine.py'}:make"})
    assert losses(other) == losses(out)  # the run goes on
    lines = (tmp_path / "out" / "mine.txt").read_text().splitlines()
    assert lines[0] == "4" and [json.loads(x)["step"] for x in lines[1:]] == [1, 2, 3, 4]
    assert "Mine failed (the other side hung up)" in capsys.readouterr().err
    for name, told in (("mine", "is not MODULE:FUNCTION"), ("no.such:make", "cannot be loaded"),
                       ("json:nothing", "no function nothing"), (f"{tmp_path / 'none.py'}:make", "cannot be loaded")):
        with pytest.raises(ConfigError, match=told):
            load_sink(name)


def test_lines_of_steps_that_will_be_done_again_are_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path, 0)
    for step in (1, 2, 3):
        lines.write({"step": step, "loss": float("nan") if step == 2 else 1.5})
    lines.close()
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    lines = JsonLines(path, 2)
    lines.sync()
    lines.write({"step": 3, "loss": 2.5})
    lines.close()
    rows = [json.loads(x, parse_constant=pytest.fail) for x in path.read_text().splitlines()]
    assert rows == [{"step": 1, "loss": 1.5}, {"step": 2, "loss": None}, {"step": 3, "loss": 2.5}]


def test_without_tensorboard_a_run_still_logs(first, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    recipe = find(first[0]).override({"tensorboard": "true"})
    metrics = Metrics(tmp_path, 0, recipe)
    metrics.log({"step": 1, "loss": 1.0, "lr": 0.1, "tokens_per_s": 5.0}, eta=3.0)
    metrics.close()
    assert losses(tmp_path) == [1.0]


def test_tensorboard_gets_the_figures(first, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = find(first[0]).override({"tensorboard": "true"})
    metrics = Metrics(tmp_path, 0, recipe)
    for step in (1, 2):
        metrics.log({"step": step, "loss": 3.0 - step, "lr": 0.1, "tokens_per_s": 5.0}, eta=3.0)
    metrics.close()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in board.Scalars("loss")] == [(1, 2.0), (2, 1.0)]


def test_exports_are_the_weights_of_the_checkpoint(first, tmp_path, capsys):
    _, _, out = first
    checkpoint = out / "checkpoints" / "step-00000008"
    with pytest.raises(SystemExit) as done:
        main(["export", str(out), "-o", str(tmp_path / "newest"), "--dtype", "float32"])
    assert done.value.code == 0, capsys.readouterr().err
    newest = HybridLM.from_pretrained(tmp_path / "newest")
    final = HybridLM.from_pretrained(out / "hf")  # bfloat16
    for (name, a), b in zip(newest.state_dict().items(), final.state_dict().values(), strict=True):
        assert torch.equal(a.to(b.dtype), b), name
    with pytest.raises(SystemExit):
        main(["export", str(checkpoint), "-o", str(tmp_path / "step8.gguf"), "--type", "f32"])
    with Engine.open(tmp_path / "step8.gguf") as engine:
        assert engine.tokenizer is not None
    with pytest.raises(SystemExit):
        main(["export", str(checkpoint), "-o", str(tmp_path / "step8")])
    assert (tmp_path / "step8" / "tokenizer.json").is_file()
    assert not torch.equal(HybridLM.from_pretrained(tmp_path / "step8").head_weight, final.head_weight)
    with pytest.raises(SystemExit):
        main(["export", str(tmp_path / "step8"), "-o", str(tmp_path / "again.gguf")])
    assert (tmp_path / "again.gguf").is_file()
    assert not list(tmp_path.glob(".*.tmp"))
    capsys.readouterr()
    for arguments, told in (([str(tmp_path / "none"), "-o", "x"], "no such run"),
                            ([str(out), "-o", str(tmp_path / "step8")], "exists already"),
                            ([str(out), "-o", str(tmp_path / "x.gguf"), "--type", "q9"], "q9")):
        with pytest.raises(SystemExit) as done:
            main(["export", *arguments])
        assert done.value.code == 1 and told in capsys.readouterr().err


def test_pretraining_goes_on_from_a_model_on_the_hub(first, tmp_path, monkeypatch):
    recipe, data, out = first
    monkeypatch.setenv("HYBRIDLM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    shutil.copytree(out / "hf", tmp_path / "served" / "someone" / "released")
    settings = {"data": str(data), "out": str(tmp_path / "on"), "init": "someone/released", "steps": "2", "warmup": "0"}
    with HubServer(tmp_path / "served") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        on = run(recipe, settings)
    assert losses(on)[0] < losses(out)[0] - 0.3
    held = json.loads((on / "recipe.json").read_text())
    assert held["init"] == "someone/released"
    assert json.loads((on / "tokenizer" / "tokenizer.json").read_text()) == json.loads(
        (out / "tokenizer" / "tokenizer.json").read_text())
    run(recipe, {**settings, "steps": "4"})  # without the network
    assert len(losses(on)) == 4
    local = run(recipe, {**settings, "init": str(out), "out": str(tmp_path / "local"), "steps": "2"})
    assert losses(local)[0] == pytest.approx(losses(on)[0], abs=0.02)  # float32 against bfloat16
