"""The checks before a run: what they say of good and of bad machines."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from hybridlm.cli import build_app
from hybridlm.train import doctor


@pytest.mark.parametrize(("line", "verdict", "told"), [
    ("0, 31, 4, 81559, 0", "good", "31 C"),
    ("1, 55, 4, 81559, 0", "doubtful", "hot"),
    ("2, 64, 4, 81559, [N/A]", "bad", "hot"),
    ("3, 31, 60000, 81559, 0", "bad", "memory is taken"),
    ("4, 31, 4, 81559, 2", "bad", "take it out"),
    ("5, [N/A], [N/A], [N/A], [N/A]", "good", ""),
])
def test_a_gpu_is_judged_by_heat_memory_and_errors(line, verdict, told):
    finding = doctor.judge_gpu(line)
    assert finding.verdict == verdict
    assert told in finding.told


def test_this_machine_is_examined(tmp_path):
    got = CliRunner().invoke(build_app("doctor"), ["doctor", str(tmp_path), "--json", "--nproc", "2"])
    findings = {f["what"]: f for f in json.loads(got.stdout)}
    assert got.exit_code == 0, got.output
    assert {"versions", "GPUs", "disk room", "disk speed", "reduction"} <= set(findings)
    assert "all-reduced" in findings["reduction"]["told"]
    assert not list(tmp_path.iterdir())


def test_what_is_missing_is_bad(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "_together", lambda *a: [])
    (tmp_path / "file").write_text("")
    findings = {f.what: f for f in doctor.examine(tmp_path / "file" / "x", gpus=64)}
    assert findings["GPUs"].verdict == "bad"
    assert "64 expected" in findings["GPUs"].told
    assert findings["disk"].verdict == "bad"
    room = {f.what: f for f in doctor.examine(tmp_path, need_gb=1e9)}
    assert room["disk room"].verdict == "bad"
