"""Reading runs and points, and tokens to parity along trajectories."""

import contextlib
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.scaling.folders import write_run
from tests.scaling.truth import points

from hybridlm.errors import DataError
from hybridlm.report import read_evaluations
from hybridlm.scaling import Point, by_decays, by_phase, constrained, gather, read_run, seed_noise, usable
from hybridlm.scaling.analysis import analyse
from hybridlm.scaling.runs import Gathered, decay_ends
from hybridlm.scaling.trajectory import crossing, plateau, smooth

# The second law is the first with 60% of the tokens.
THEIRS, OURS = (lambda t: 2.0 + 30.0 * t**-0.2), (lambda t: 2.0 + 30.0 * (t / 0.6) ** -0.2)


def test_a_run_is_read(tmp_path):
    run = read_run(write_run(tmp_path / "r", unique=100_000))
    assert run.arm == "hybrid 3:1" and run.params and run.schedule == "wsd"
    assert run.epochs(400_000) == 4 and run.val_bits_per_byte["code"] > 0
    assert len(run.series("loss")[0]) == 400 and len(run.series("val_bits_per_byte")[0]) == 20
    assert read_run(write_run(tmp_path / "t", twin=True)).arm == "transformer"


def test_decays_are_found_in_wsd_and_wsds(tmp_path):
    assert decay_ends(read_run(write_run(tmp_path / "one"))) == [399]
    assert decay_ends(read_run(write_run(tmp_path / "three", periods=3))) == [99, 199, 399]
    assert decay_ends(read_run(write_run(tmp_path / "none", decay=0.0))) == [399]
    cut = write_run(tmp_path / "cut")
    lines = (cut / "metrics.jsonl").read_text().splitlines()
    (cut / "metrics.jsonl").write_text("\n".join(lines[:300]))
    assert decay_ends(read_run(cut)) == []
    assert "same phase" in gather([cut]).notes[0]


def test_points_of_runs_share_one_validation(tmp_path):
    one, more = write_run(tmp_path / "one", unique=50_000), write_run(tmp_path / "more", periods=3)
    found = gather([one, f"other={more}"])
    assert [(p.arm, p.tokens) for p in found.points] == [
        ("hybrid 3:1", 4e5), ("other", 1e5), ("other", 2e5), ("other", 4e5)]
    assert found.points[0].epochs == 8 and constrained(found.points[0]) and len(usable(found.points)) == 3
    unvalidated = write_run(tmp_path / "unvalidated", periods=3, val=False)
    assert len(gather([unvalidated]).points) == 0 and "val_every" in gather([unvalidated]).notes[0]
    assert len(gather([one, write_run(tmp_path / "final", val=False)]).points) == 2  # by result.json


@pytest.mark.parametrize("content, words", [
    ('[{"params": 1e6, "tokens": 1e7}]', "point 0: loss must be a number from 1e-06 to 1e+06, not None"),
    ('[{"params": -1, "tokens": 1e7, "loss": 2}]', "params must be a number from 1"),
    ('[{"params": 1, "tokens": 1e7, "loss": 2, "epochs": "two"}]', "epochs"),
    ("[]", "holds no points"), ("{", "no JSON"), ('{"points": 3}', "holds no points"), ("[3]", "point 0 is no object"),
    ("[" * 100_000, "no JSON")])
def test_malformed_points_name_the_file(tmp_path, content, words):
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(DataError, match=r"p\.json") as caught:
        gather([tmp_path / "p.json"])
    assert words in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from([10**400, -1, 1e308]) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
        st.sampled_from(["points", "params", "tokens", "loss", "epochs", "unique_tokens", "arm", "task", "metrics",
                         "acc", "acc_stderr", "results", "model", "value", "stderr", "step", "lr", "unit", "schedule",
                         "val_bits_per_byte", "shards", "files"]), inner, max_size=6), max_leaves=25)


@given(JSON, st.booleans())
@settings(max_examples=100, deadline=None)
def test_whatever_json_holds_it_is_read_or_refused(tmp_path_factory, value, wrapped):
    """Points, evaluation records, a run's result and its metrics: a `DataError` at worst."""
    folder = tmp_path_factory.mktemp("any")
    text = json.dumps({"points": [value]} if wrapped else value)
    for name in ("p.json", "results.json", "recipe.json", "result.json"):
        (folder / name).write_text(text)
    (folder / "metrics.jsonl").write_text(text + '\n{"tokens": 5, "loss": 3.0, "lr": 0.1}\n')
    for read in (lambda: analyse(gather([folder / "p.json"]), draws=50), lambda: read_evaluations(folder),
                 lambda: analyse(gather([folder]), draws=50)):
        with contextlib.suppress(DataError):
            read()


@given(st.lists(st.tuples(st.sampled_from("ht"), st.floats(1, 1e18), st.floats(1, 1e18), st.floats(1e-6, 1e6)),
                min_size=6, max_size=16))
@settings(max_examples=8, deadline=None)
def test_any_points_are_fitted_or_refused(rows):
    found = analyse(Gathered([Point(*row) for row in rows]), draws=50)
    json.dumps(found.to_dict(), allow_nan=False)


def test_malformed_runs_name_the_file(tmp_path):
    run = write_run(tmp_path / "r")
    good = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(good + '{"step": 401, "lo')  # being written: fine
    assert len(read_run(run).tokens) == 400
    for text, words in (("nonsense\n" + good, "line 1"), ("", "holds no record"), (good + good, "more than one run"),
                        ('{"loss": 1}\n' + good, "no record with tokens")):
        (run / "metrics.jsonl").write_text(text)
        with pytest.raises(DataError, match=words):
            read_run(run)
    (run / "metrics.jsonl").write_text(good)
    (run / "recipe.json").write_text('{"model": {"vocab_size": 3}}')
    with pytest.raises(DataError, match=r"recipe\.json"):
        read_run(run)
    (run / "recipe.json").unlink()
    assert "size is unknown" in gather([run]).notes[0]
    with pytest.raises(DataError, match=r"no metrics\.jsonl"):
        read_run(tmp_path)
    for paths, words in (([tmp_path / "absent"], "no such file"), ([run, f"again={run}"], "given twice")):
        with pytest.raises(DataError, match=words):
            gather(paths)


def test_units_do_not_mix(tmp_path):
    (tmp_path / "p.json").write_text(json.dumps({"unit": "nats", "points": [{"params": 1, "tokens": 2, "loss": 3}]}))
    with pytest.raises(DataError, match="do not belong in one fit"):
        gather([tmp_path / "p.json", write_run(tmp_path / "r")])


def test_seed_noise():
    twice = [Point("x", n, 1e9, 3.0 * math.exp(s * 0.004 / math.sqrt(2))) for n in (1e6, 2e6) for s in (1, -1)]
    assert seed_noise(twice) == pytest.approx(0.004) and seed_noise(twice[::2]) is None


# -- trajectories ----------------------------------------------------------------------------------------------------


def test_decays_and_plateaus_find_the_factor(tmp_path):
    theirs = write_run(tmp_path / "t", law=THEIRS, twin=True, periods=4, steps=1600, jitter=2e-3)
    ours = write_run(tmp_path / "h", law=OURS, periods=4, steps=1600, jitter=2e-3)
    found = gather([ours, theirs])
    decays = [c.factor for c in by_decays(found.points, "hybrid 3:1", "transformer") if c.factor]
    assert len(decays) == 3 and np.allclose(decays, 0.6, atol=0.04)
    first = by_decays(found.points, "hybrid 3:1", "transformer")[0]
    assert first.factor is None and "already lower" in first.note
    same = by_phase(*found.runs)
    assert same.how == "same phase" and same.factor == pytest.approx(0.6, abs=0.03) and "biased" not in same.note


def test_a_cosine_run_is_marked_and_is_indeed_biased(tmp_path):
    runs = [read_run(write_run(tmp_path / n, law=law, twin=t, schedule="cosine", steps=1600, drop=0.3))
            for n, law, t in (("h", OURS, False), ("t", THEIRS, True))]
    crossed = by_phase(*runs)
    assert "biased" in crossed.note and crossed.factor > 0.66  # the truth is 0.6


def test_what_is_not_reached_is_said(tmp_path):
    runs = [read_run(write_run(tmp_path / n, law=law, twin=t)) for n, law, t in (
        ("worse", THEIRS, False), ("better", OURS, True))]
    crossed = by_phase(*runs)
    assert crossed.factor is None and "not reached" in crossed.note
    assert by_decays(points(), "hybrid", "nope") == []


def test_plateau_is_the_peak_before_the_decay(tmp_path):
    tokens, _ = plateau(read_run(write_run(tmp_path / "r")), "loss")
    assert tokens[0] == 10_000 and tokens[-1] == 360_000


@given(st.floats(0.05, 0.9), st.floats(0.1, 0.5))
def test_crossing_inverts_a_power_law(share, power):
    tokens = np.geomspace(1e6, 1e9, 50)
    values = 8 * tokens**-power
    at = float(np.exp(np.log(1e6) + share * np.log(1e3)))
    assert crossing(tokens, values, 8 * at**-power) == pytest.approx(at, rel=1e-6)


def test_the_last_crossing_counts_and_none_is_none():
    tokens = np.array([1.0, 2, 3, 4])
    assert 3 < crossing(tokens, np.array([3.0, 1.9, 2.1, 1.5]), 2.0) < 4
    assert crossing(tokens, np.array([3.0, 2.9, 2.8, 2.7]), 2.0) is None


def test_smoothing_keeps_a_straight_line_and_lowers_noise():
    tokens = np.arange(1, 2001, dtype=float)
    np.testing.assert_allclose(smooth(tokens, np.exp(-0.001 * tokens)), np.exp(-0.001 * tokens), rtol=1e-9)
    noisy = np.exp(0.01 * np.random.default_rng(0).standard_normal(2000))
    assert np.std(np.log(smooth(tokens, noisy))[500:1500]) < 0.002


# -- all of it -------------------------------------------------------------------------------------------------------


def test_analysis_leaves_out_what_it_must_and_says_so():
    extra = [Point("hybrid", 6e7, 3e10, 2.0, epochs=12.0), Point("odd", 1e6, 1e9, 3.0)]
    found = analyse(Gathered(points(3e-3) + extra, unit="nats"), draws=50)
    assert found.baseline == "transformer" and found.joint and found.separate and found.test
    assert len(found.joint.fit.points) == 70 and len(found.points) == 72
    notes = " ".join(found.notes)
    assert "more than 4 times" in notes and "odd has no law" in notes
    assert {p.params for p in found.joint.parities} >= {7e9, 70e9}
    json.dumps(found.to_dict(), allow_nan=False)
    with pytest.raises(DataError, match="no such arm"):
        analyse(Gathered(points()), baseline="nope")
