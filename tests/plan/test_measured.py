"""The simulator against four runs that happened: 120 to 400 steps on 4 processes of a 2-core CPU, 3 to 4 failures each.

`runs.json` is their goodput.json, shortened. So few failures tell the goodput to a few percent at best.
"""

import json
from pathlib import Path

import pytest

from hybridlm.cli import main
from hybridlm.errors import DataError
from hybridlm.plan.measured import faults_of, predict, read_goodput

RUNS = json.loads((Path(__file__).parent / "runs.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("run", RUNS, ids=[f"{r['steps']} steps, {r['active']:.0%}" for r in RUNS])
def test_goodput_of_runs_that_happened(run):
    outcome, _ = predict(run)
    assert outcome.goodput == pytest.approx(run["active"], abs=0.06)


def test_work_done_again_over_all_of_them():
    pairs = [predict(run) for run in RUNS]
    assert sum(o.replayed for o, _ in pairs) == pytest.approx(sum(again for _, again in pairs), rel=0.5)


def test_a_run_without_failures():
    run = {**RUNS[0], "recoveries": [], "steps_lost": 0}
    assert faults_of(run).mtbf == float("inf") and predict(run)[0].failures == 0


def test_by_the_command(tmp_path, capsys):
    (tmp_path / "goodput.json").write_text(json.dumps(RUNS[1]))
    with pytest.raises(SystemExit) as done:
        main(["plan", "--measured", str(tmp_path)])
    assert done.value.code == 0 and "predicted" in capsys.readouterr().out
    (tmp_path / "goodput.json").write_text("{}")
    with pytest.raises(DataError, match="give a run's folder"):
        read_goodput(tmp_path)
