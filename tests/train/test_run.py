"""Whole runs: the curve of a run that is killed, stopped, damaged or starved of disk is that of one left alone."""

from __future__ import annotations

import json
import random
import shutil
import signal

import pytest
import torch
from tests.train.helpers import Nursery, corpus, losses, micro

from hybridlm.errors import ConfigError, DataError, HybridLMError
from hybridlm.model import HybridLM
from hybridlm.train import run


@pytest.fixture(scope="module")
def nursery():
    made = Nursery()
    yield made
    made.close()


@pytest.fixture(scope="module")
def undisturbed(nursery, tmp_path_factory):
    """(recipe, text, losses, weights) of a run of 24 steps."""
    folder = tmp_path_factory.mktemp("undisturbed")
    recipe, data = micro(folder), corpus(folder / "data")
    code, told = nursery.run(recipe, data=data, out=folder / "out")
    assert code == 0, told
    return recipe, data, losses(folder / "out"), (folder / "out" / "hf" / "model.safetensors").read_bytes(), folder


def test_a_run_leaves_what_it_promises(undisturbed):
    _, _, curve, _, folder = undisturbed
    out = folder / "out"
    assert len(curve) == 24
    assert sum(curve[-4:]) / 4 < curve[0] - 0.5
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == [f"step-000000{n}" for n in (16, 20, 24)]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "val_bits_per_byte" in r] == [8, 16, 24]
    assert set(json.loads((out / "result.json").read_text())["val_bits_per_byte"]) == {"all", "a", "b"}
    assert json.loads((out / "recipe.json").read_text())["batch"] == 4
    model = HybridLM.from_pretrained(out / "hf")
    assert model(torch.tensor([[1, 2, 3]])).shape == (1, 3, 384)


def killed_until_done(nursery, undisturbed, out, seed, most):
    recipe, data, curve, weights, _ = undisturbed
    rng, kills, longest = random.Random(seed), 0, 1.2
    while True:
        wait = rng.uniform(0.02, longest) if kills < most else None
        code, told = nursery.run(recipe, data=data, out=out, kill_after=wait)
        kills += code == -signal.SIGKILL
        assert code in (0, -signal.SIGKILL), told
        if code == 0 and kills:
            break
        if code == 0:  # done before it could be killed: again, and sooner
            shutil.rmtree(out)
            longest /= 2
    assert losses(out) == curve
    assert (out / "hf" / "model.safetensors").read_bytes() == weights
    return kills


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_moments_the_curve_is_bitwise_the_same(nursery, undisturbed, tmp_path, seed):
    assert killed_until_done(nursery, undisturbed, tmp_path / "out", seed, 4)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 140))
def test_killed_at_many_random_moments(nursery, undisturbed, tmp_path, seed):
    assert killed_until_done(nursery, undisturbed, tmp_path / "out", seed, 12)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_asked_to_stop_it_saves_first(nursery, undisturbed, tmp_path, number, code):
    recipe, data, curve, _, folder = undisturbed
    out = tmp_path / "out"
    for part in ("tokenizer", "tokens"):
        shutil.copytree(folder / "out" / part, out / part)
    settings = {"data": data, "out": out, "save_every": 0}
    got, told = nursery.run(recipe, steps_first=3, number=number, **settings)
    assert got == code, told
    assert "with a checkpoint" in told
    done = len(losses(out))
    assert 3 <= done < 24
    assert (out / "checkpoints" / f"step-{done:08d}" / "manifest.json").exists()
    assert nursery.run(recipe, **settings)[0] == 0
    assert losses(out) == curve


def copy_at(folder, tmp_path, step):
    """The finished run as it was after `step`."""
    out = tmp_path / "out"
    shutil.copytree(folder / "out", out)
    for checkpoint in (out / "checkpoints").iterdir():
        if int(checkpoint.name[-8:]) > step:
            shutil.rmtree(checkpoint)
    return out


@pytest.mark.parametrize(("name", "harm"), [
    ("weights.safetensors", "flip"), ("optimizer.pt", "cut"), ("state.json", "remove"), ("manifest.json", "remove"),
    ("manifest.json", "cut"), ("optimizer.pt", "empty"),
])
def test_a_damaged_checkpoint_is_passed_over(undisturbed, tmp_path, capsys, name, harm):
    recipe, data, curve, weights, folder = undisturbed
    out = copy_at(folder, tmp_path, 20)
    file = out / "checkpoints" / "step-00000020" / name
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 4
    file.unlink()
    if harm != "remove":
        file.write_bytes({"flip": raw, "cut": raw[:-9], "empty": b""}[harm])
    run(recipe, {"data": str(data), "out": str(out)})
    told = capsys.readouterr().err
    assert "falling back" in told
    assert "step-00000020" in told
    assert "resuming after step 16" in told
    assert losses(out) == curve
    assert (out / "hf" / "model.safetensors").read_bytes() == weights


def test_all_checkpoints_damaged_is_an_error_not_a_new_start(undisturbed, tmp_path):
    recipe, data, _, _, folder = undisturbed
    out = copy_at(folder, tmp_path, 24)
    for checkpoint in (out / "checkpoints").iterdir():
        (checkpoint / "state.json").write_text("{}")
    with pytest.raises(DataError, match="all 3 checkpoints are damaged"):
        run(recipe, {"data": str(data), "out": str(out)})


def test_a_disk_that_is_full_loses_nothing_that_was_saved(nursery, undisturbed, tmp_path):
    """The limit on file size stands for the disk: the weights fit, the moments, twice as large, do not."""
    recipe, data, curve, _, folder = undisturbed
    out = copy_at(folder, tmp_path, 16)
    size = (out / "checkpoints" / "step-00000016" / "weights.safetensors").stat().st_size
    code, told = nursery.run(recipe, data=data, out=out, limit=size + 1000)
    assert code == 1, told
    assert "step-00000020: the checkpoint cannot be written" in told
    assert "make room" in told
    assert "Traceback" not in told
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-00000016"]
    assert nursery.run(recipe, data=data, out=out)[0] == 0
    assert losses(out) == curve


def test_a_finished_run_does_nothing_more(undisturbed, tmp_path):
    recipe, data, curve, weights, folder = undisturbed
    out = copy_at(folder, tmp_path, 24)
    run(recipe, {"data": str(data), "out": str(out)})
    assert losses(out) == curve
    assert (out / "hf" / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize(("settings", "told"), [
    ({"batch": "8"}, "^batch: differs .*it was 4, not 8"),
    ({"seed": "1"}, "^seed: differs"),
    ({"model.intermediate_size": "64"}, "^model: differs"),
    ({"vocab": "310", "val_fraction": "0.5"}, "val_fraction differ"),
])
def test_another_run_in_the_same_folder_is_refused(undisturbed, tmp_path, settings, told):
    recipe, data, _, _, folder = undisturbed
    out = copy_at(folder, tmp_path, 24)
    with pytest.raises(HybridLMError, match=told):
        run(recipe, {"data": str(data), "out": str(out), **settings})


def test_two_processes_in_one_folder(undisturbed, tmp_path):
    import fcntl

    recipe, data, _, _, _ = undisturbed
    out = tmp_path / "out"
    out.mkdir()
    with (out / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process"):
            run(recipe, {"data": str(data), "out": str(out)})


def test_missing_and_tiny_data(undisturbed, tmp_path, capsys):
    recipe = undisturbed[0]
    with pytest.raises(DataError, match=r"absent\.txt: cannot be read"):
        run(recipe, {"data": str(tmp_path / "absent.txt"), "out": str(tmp_path / "a")})
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match="no text"):
        run(recipe, {"data": str(tmp_path / "empty.txt"), "out": str(tmp_path / "b")})
    (tmp_path / "word.txt").write_text("word")
    out = run(recipe, {"data": str(tmp_path / "word.txt"), "out": str(tmp_path / "c"), "steps": "3"})
    told = capsys.readouterr().err
    assert "fewer than a sequence" in told
    assert "nothing held out" in told
    assert len(losses(out)) == 3


def test_a_loss_that_is_not_a_number_stops_the_run(undisturbed, tmp_path):
    recipe, data = undisturbed[:2]
    with pytest.raises(HybridLMError, match=r"step .*: the loss is .*lower lr"):
        run(recipe, {"data": str(data), "out": str(tmp_path / "out"), "lr": "1e30", "clip": "0"})


def test_accumulated_recomputed_and_whole_batches_give_the_same_curve(undisturbed, tmp_path):
    recipe, data, curve, _, _ = undisturbed
    for number, settings in enumerate(({"microbatch": "1"}, {"recompute": "true"}, {"microbatch": "2"})):
        out = run(recipe, {"data": str(data), "out": str(tmp_path / str(number)), "steps": "24", **settings})
        assert losses(out) == pytest.approx(curve, abs=2e-3)
        assert losses(out)[:3] == pytest.approx(curve[:3], abs=1e-5)


def test_a_budget_of_seconds_ends_with_the_schedule(undisturbed, tmp_path):
    recipe, data = undisturbed[:2]
    out = run(recipe, {"data": str(data), "out": str(tmp_path / "out"), "seconds": "8"})
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) > 5
    assert rows[-1]["lr"] < 0.25 * max(r["lr"] for r in rows)
    assert (out / "hf" / "config.json").exists()


def test_starting_from_a_model(undisturbed, tmp_path):
    recipe, data, curve, _, folder = undisturbed
    start = folder / "out" / "hf"
    out = run(recipe, {"data": str(data), "out": str(tmp_path / "out"), "init": str(start), "tokenizer": str(start),
                       "steps": "2"})
    assert losses(out)[0] < curve[0] - 0.5


@pytest.mark.slow
def test_compiled_in_bfloat16_it_learns_as_well(undisturbed, tmp_path):
    recipe, data, curve, _, _ = undisturbed
    out = run(recipe, {"data": str(data), "out": str(tmp_path / "out"), "compile": "true", "dtype": "bfloat16"})
    assert losses(out) == pytest.approx(curve, abs=0.1)
