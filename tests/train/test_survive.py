"""Ranks under the launcher: killed, frozen, lost, asked to leave; and the report of what it cost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.train.helpers import corpus, losses, micro

from hybridlm.errors import ConfigError, DataError
from hybridlm.train.events import Events, read_events
from hybridlm.train.faults import KILLING, KINDS, Fault, damage_newest, make_plan, read_plan, write_plan
from hybridlm.train.goodput import goodput
from hybridlm.train.launch import Launch
from hybridlm.train.watchdog import LAYOUT, SILENT, Beat, Watch

ROOT = Path(__file__).parents[2]


def start(recipe: str, *words: str, **settings: object) -> subprocess.Popen[str]:
    changes = [f"{k}={v}" for k, v in settings.items()]
    command = [sys.executable, "-m", "hybridlm.cli", "train", recipe, *changes, *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"})


def finish(process: subprocess.Popen[str], limit: float = 120) -> tuple[int, str]:
    told, _ = process.communicate(timeout=limit)
    return process.returncode, told


def test_a_short_run_through_faults_is_bitwise_that_of_a_calm_one(tmp_path):
    """A rank killed, a rank frozen, a batch that gives no number, a damaged checkpoint; `make faults` in small."""
    done = subprocess.run(
        [sys.executable, "benchmarks/faults.py", "--size", "micro", "--nproc", "2", "--nnodes", "1", "--steps", "80",
         "--kinds", "kill,freeze,damage", "--at-steps", "20,40,62", "--bad-batches", "30", "--save-every", "6",
         "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    told = done.stdout + done.stderr + (tmp_path / "faulted.log").read_text()[-2000:]
    assert done.returncode == 0, told
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["curve_equal"], told
    assert {k: n for k, n in result["faults"].items() if n} == {"kill": 1, "freeze": 1, "damage": 1, "nan": 1}
    assert result["restarts"] == 3
    assert result["recovery"]["count"] == 4
    assert result["unreadable"] == []
    figures = goodput(tmp_path / "faulted")
    assert figures["steps"] == 80
    assert figures["skipped"] == 1
    assert figures["checkpoints"]["damaged"] == 1


@pytest.mark.slow
def test_saved_on_four_resumed_on_others(tmp_path):
    """The same batches, and the same losses but for the order of sums."""
    recipe, data = micro(tmp_path), corpus(tmp_path / "data")
    settings = {"data": data, "batch": 12, "lr": 1e-3, "keep": 9}
    code, told = finish(start(recipe, "--nproc", "4", out=tmp_path / "four", **settings))
    assert code == 0, told
    curve = losses(tmp_path / "four")
    running = []
    for world in (1, 2, 3):
        out = tmp_path / str(world)
        shutil.copytree(tmp_path / "four", out)
        for path in (out / "checkpoints").iterdir():
            if int(path.name[-8:]) > 12:
                shutil.rmtree(path)
        running.append((out, start(recipe, *(["--nproc", str(world)] if world > 1 else []), out=out, **settings)))
    for out, process in running:
        code, told = finish(process)
        assert code == 0, told
        assert "resuming after step 12" in told
        assert losses(out)[:12] == curve[:12]
        assert losses(out) == pytest.approx(curve, abs=1e-5)


def test_asked_to_leave_all_ranks_save_first(tmp_path):
    recipe, data = micro(tmp_path), corpus(tmp_path / "data")
    settings = {"data": data, "out": tmp_path / "out", "steps": 100_000, "save_every": 0, "val_every": 0}
    process = start(recipe, "--nproc", "2", **settings)
    metrics = tmp_path / "out" / "metrics.jsonl"
    while process.poll() is None and (not metrics.exists() or metrics.read_bytes().count(b"\n") < 3):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    code, told = finish(process)
    assert code == 143, told
    done = len(losses(tmp_path / "out"))
    assert (tmp_path / "out" / "checkpoints" / f"step-{done:08d}" / "manifest.json").exists()


def test_a_mistake_is_told_once_and_not_tried_again(tmp_path):
    recipe, data = micro(tmp_path), corpus(tmp_path / "data")
    code, told = finish(start(recipe, "--nproc", "2", data=data, out=tmp_path / "out", batch=3, steps=5))
    assert code == 1
    assert told.count("error:") == 1
    assert "Traceback" not in told
    assert sum(e["kind"] == "start" for e in read_events(tmp_path / "out")) <= 2


def test_what_fails_every_time_is_given_up(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("def recipe():\n    raise ZeroDivisionError('every time')\n")
    code, told = finish(start(str(broken), "--nproc", "1", data=tmp_path, out=tmp_path / "out"))
    assert code == 1
    assert "giving up" in told or "every time" in told


@pytest.mark.parametrize(("given", "told"), [
    ({"nproc": 0}, "nproc"), ({"nproc": 1, "nnodes": "0"}, "nnodes"), ({"nproc": 1, "nnodes": "3:2"}, "nnodes"),
    ({"nproc": 1, "nnodes": "1:2:3"}, "nnodes"), ({"nproc": 1, "meet": "host"}, "meet"),
])
def test_launches_that_cannot_be(given, told):
    with pytest.raises(ConfigError, match=told):
        Launch(**given)


def test_plans_are_a_function_of_the_seed_and_kill_enough():
    for seed in range(5):
        plan = make_plan(seed, seconds=3600, every=60)
        assert plan == make_plan(seed, seconds=3600, every=60)
        assert 50 <= len(plan) <= 72
        assert sum(f.kind in KILLING for f in plan) / len(plan) >= 0.6
        assert {f.kind for f in plan} == set(KINDS)
    assert make_plan(1, seconds=99, every=9) != make_plan(2, seconds=99, every=9)


def test_a_plan_survives_its_launcher(tmp_path):
    plan = [Fault(1.5, "kill", 0.25), Fault(0.0, "freeze", 0.75, done=True, step=7)]
    write_plan(tmp_path / "plan.json", plan, 12.5)
    assert read_plan(tmp_path / "plan.json") == (12.5, plan)
    assert damage_newest(tmp_path, 0.5) is None


def test_beats_tell_frozen_and_stuck_from_busy(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    now = time.monotonic()

    def pulse(pid, rank, silent=0.0, idle=0.0, longest=0.5, step=5):
        (tmp_path / str(pid)).write_bytes(LAYOUT.pack(now - silent, now - idle if idle else 0.0, longest, step, rank))

    watch = Watch(tmp_path)
    try:
        pulse(os.getpid(), 0, idle=500, step=6)
        pulse(child.pid, 1)
        assert watch.sick() == []  # the second does something slow
        pulse(child.pid, 1, idle=400)
        assert [p.rank for p, _ in watch.sick()] == [1]  # both are stuck, and the other waits for it
        pulse(os.getpid(), 0, idle=30)
        assert watch.sick() == []
        pulse(child.pid, 1, silent=SILENT + 1)
        assert [(p.rank, why.split()[0]) for p, why in watch.sick()] == [(1, "no")]
        pulse(child.pid, 1, silent=SILENT + 1, longest=4.0)  # steps of 4 s: give it longer
        assert watch.sick() == []
    finally:
        child.kill()
        child.wait()
    assert [p.rank for p in watch.pulses()] == [0]


def test_a_beat_says_where_it_is_and_is_silent_without_a_launcher(tmp_path):
    beat = Beat(tmp_path, 3)
    beat.beat(7)
    with beat.slow():
        (pulse,) = Watch(tmp_path).pulses()
        assert (pulse.rank, pulse.step, pulse.idle) == (3, 7, 0.0)
        assert pulse.silent < SILENT
    Beat(None, 0).beat(1)


def test_goodput_adds_up(tmp_path):
    """20 steps of a second; a kill at 5.5 that costs a replay of one step and 4.5 s; a pause between two launches."""
    events = Events(tmp_path, 0)
    with pytest.raises(DataError, match="fewer than two steps"):
        goodput(tmp_path)

    def write(when: float, kind: str, **fields: object) -> None:
        with (tmp_path / "events" / "rank-00000.jsonl").open("a") as file:
            file.write(json.dumps({"time": when, "kind": kind, **fields}) + "\n")

    write(0.0, "start")
    for step in range(1, 6):
        write(float(step), "step_new", step=step)
    write(5.5, "fault", what="kill", rank=0)
    write(8.0, "start")
    write(9.0, "step_again", step=5)
    write(10.0, "step_new", step=6)
    for step in range(7, 21):
        write(4.0 + step, "step_new", step=step)
    write(24.0, "checkpoint_stall", step=20, seconds=0.5)
    figures = goodput(tmp_path)
    assert figures["steps"] == 20
    assert figures["seconds"] == 24.0
    assert figures["steps_lost"] == 1
    assert figures["restarts"] == 1
    assert figures["active"] == pytest.approx(19.5 / 24, abs=1e-3)
    assert figures["recovery"] == {"count": 1, "median": 4.5, "p95": 4.5, "longest": 4.5}
    events.close()


def test_events_survive_a_torn_line_and_know_what_is_new(tmp_path):
    events = Events(tmp_path, 0)
    events.step(1)
    events.step(2)
    events.close()
    with (tmp_path / "events" / "rank-00000.jsonl").open("ab") as file:
        file.write(b'{"time": 1, "kind": "st')
    again = Events(tmp_path, 0)
    again.step(2)
    again.step(3)
    assert [(e["kind"], e["step"]) for e in read_events(tmp_path)] == [
        ("step_new", 1), ("step_new", 2), ("step_again", 2), ("step_new", 3)]
    again.close()
