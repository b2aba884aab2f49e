"""`hybridlm scaling` and `hybridlm report` from the command line."""

import json

import pytest
from tests.scaling.folders import write_run
from tests.scaling.truth import FACTOR, points

from hybridlm.cli import main


@pytest.fixture
def call(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments):
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    return call


@pytest.fixture
def ladder(tmp_path):
    file = tmp_path / "points.json"
    rows = [{"arm": p.arm, "params": p.params, "tokens": p.tokens, "loss": p.loss, "epochs": 1}
            for p in points(1e-3, 1)]
    file.write_text(json.dumps({"unit": "nats", "points": rows}))
    return file


def test_scaling_prints_laws_factors_and_doubts(call, ladder):
    code, out, err = call("scaling", ladder, "--draws", 60)
    assert code == 0, err
    for words in ("joint (E, A, a, b shared)", "separate", "7.00B", "70.00B", "extrapolated: 7x the largest N",
                  "not refused by the data", "by trajectory", "which no point has tested"):
        assert words in out, words


def test_scaling_as_json(call, ladder):
    code, out, _ = call("scaling", ladder, "--draws", 60, "--at", "1B:160B", "--at", "3b:1.5t", "--json")
    data = json.loads(out)
    assert code == 0 and data["baseline"] == "transformer" and len(data["points"]) == 70
    joint, separate = data["fits"]
    at = {(s["params"], s["tokens"]): s for s in joint["savings"]}
    assert at[1e9, 160e9]["factor"] == pytest.approx(FACTOR, rel=0.05) and at[1e9, 160e9]["measured"]
    assert not at[3e9, 1.5e12]["measured"] and separate["shared"] == []


def test_scaling_of_runs_without_a_law(call, tmp_path):
    runs = [write_run(tmp_path / "h"), write_run(tmp_path / "t", twin=True)]
    code, out, err = call("scaling", *runs)
    assert code == 0 and "same phase" in out and "has no law" in err


@pytest.mark.parametrize("arguments, code, words", [
    (["absent"], 1, "no such file or folder"), (["POINTS", "--share", "E,q"], 2, "'q' is not among"),
    (["POINTS", "--at", "7B"], 2, "is not N:D"), (["POINTS", "--at", "x:6T"], 2, "is not N:D"),
    (["POINTS", "--baseline", "nope"], 1, "no such arm"), (["POINTS", "--resample", "all"], 2, "residuals, points"),
    ([], 2, "Missing")])
def test_mistakes_are_one_line(call, ladder, arguments, code, words):
    got, out, err = call("scaling", *(ladder if a == "POINTS" else a for a in arguments))
    assert got == code and words in err and not out and err.count("\n") == 1 and err.startswith("error: ")


def test_report_writes_page_markdown_and_plots(call, tmp_path):
    run = write_run(tmp_path / "r")
    code, _, err = call("report", tmp_path / "out" / "r.html", run)
    assert code == 0 and "r.html" in err and "r.md" in err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["r-plots", "r.html", "r.md"]
    code, out, err = call("report", tmp_path / "x.html", tmp_path / "absent")
    assert code == 1 and "absent" in err and not (tmp_path / "x.html").exists() and not out
