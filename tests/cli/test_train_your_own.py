"""docs/train-your-own.md works: every command of it, as it stands, on a CPU, in the order of the page."""

import io
import re
import shlex
from pathlib import Path

import pytest
from tests.data.helpers import text

from hybridlm.cli import main

PAGE = (Path(__file__).parents[2] / "docs" / "train-your-own.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    (hybridlm .*)$", PAGE, re.MULTILINE)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    (folder / "mytext").mkdir()
    for i in range(12):
        (folder / "mytext" / f"{i}.txt").write_text(text(i, 900), encoding="utf-8")
    (folder / "held-out.txt").write_text(text(99, 500), encoding="utf-8")
    return folder


def test_the_page_shows_the_whole_road():
    shown = [line.split()[1] for line in COMMANDS]
    assert shown == ["tokenizer", "tokenizer", "plan", "plan", "train", "report", "train", "eval", "export", "generate",
                     "chat", "train", "train"]


def test_every_command_runs(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setenv("HYBRIDLM_HOME", str(place / "home"))
    told = {}
    for line in COMMANDS:
        monkeypatch.setattr("sys.stdin", io.StringIO("the hybrid model\n"))
        with pytest.raises(SystemExit) as stop:
            main(shlex.split(line)[1:])
        out, err = capsys.readouterr()
        assert not stop.value.code, f"{line}\n{out}{err}"
        told[line] = out + err
    bits = float(re.search(r"([\d.]+) bits per byte", told[next(c for c in COMMANDS if " eval " in c)])[1])
    assert 0.5 < bits < 3
    assert (place / "run.sbatch").read_text().startswith("#!/bin/bash")
    assert (place / "runs" / "try" / "report.html").stat().st_size > 50_000
    again = [(place / "runs" / name / "metrics.jsonl").read_text().splitlines() for name in ("try", "again")]
    losses = [[re.search(r'"loss": ([\d.]+)', row)[1] for row in rows] for rows in again]
    assert losses[0] == losses[1] and len(losses[0]) == 30
    (place / "told.txt").write_text("\n".join(told[c] for c in COMMANDS if " plan " in c))


def test_the_plans_on_the_page_are_the_commands_own(capsys):
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", PAGE, re.MULTILINE)
    plans = [c for c in COMMANDS if c.startswith("hybridlm plan")]
    assert len(rows) == len(plans)
    for (gpus, memory, speed, time, cost), line in zip(rows, plans, strict=True):
        with pytest.raises(SystemExit):
            main(shlex.split(line)[1:])
        out = capsys.readouterr().out
        assert f"on {gpus} x H100" in out
        for words in (f"in all{' ' * 0}", f"{speed} tokens/s", f"{time} with failures", f"{cost} at 2.5 each"):
            assert words in out, words
        assert re.search(rf"in all +{re.escape(memory)} of 80", out)
