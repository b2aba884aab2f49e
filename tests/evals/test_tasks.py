"""Benchmarks from file to figures: prompts, scores by hand, resuming, and every mistake a user can make with a file."""

from __future__ import annotations

import gzip
import json
import math
import types

import numpy as np
import pytest
from tests.data.helpers import tokenizer
from tests.evals import bench_items

from hybridlm.errors import ConfigError, DataError
from hybridlm.evals import open_task
from hybridlm.evals.cases import blocks_of, encode_pairs, load
from hybridlm.evals.generation import gsm8k_score, passes
from hybridlm.evals.items import read_items
from hybridlm.evals.results import mean, ratio
from hybridlm.evals.run import run
from hybridlm.evals.tasks import TASKS, parse

MODEL = {"name": "fake", "fingerprint": "0"}


class Fake:
    """Log-probabilities from the tokens alone, and a note of what was asked."""

    def __init__(self, context=4096, stop_after=None):
        self.context, self.calls, self.stop_after = context, [], stop_after

    def continuations(self, requests, prefix=0):
        if self.stop_after is not None and len(self.calls) == self.stop_after:
            raise KeyboardInterrupt
        self.calls.append((requests, prefix))
        heads = {tuple(context[:prefix]) for context, _ in requests}
        assert len(heads) <= 1
        assert all(len(context) > prefix for context, _ in requests)
        return [(-(hash((tuple(a), tuple(b))) % 1000) / 100 - len(b), hash(tuple(b)) % 2 == 0) for a, b in requests]

    def generate_until(self, prompts, max_tokens, stop=(), prefix=0):
        self.calls.append(prompts)
        return [f" so it is\n#### {i}" for i, _ in enumerate(prompts)]


@pytest.fixture
def data(tmp_path):
    for task in TASKS.values():
        bench_items.write(tmp_path / "data", task.file, 70 if task.name in ("mmlu", "piqa") else 8)
        if task.examples:
            bench_items.write(tmp_path / "data", task.examples, 12, seed=1)
    return tmp_path / "data"


def planned(name, data, context=4096, **options):
    return open_task.plan(name, data, tokenizer(), context, **options)


@pytest.mark.parametrize("name", [f"{t.name}:{form}" for t in TASKS.values() for form in t.forms])
def test_every_task_in_every_form_runs(name, data):
    plan = planned(name, data)
    result = run(plan, Fake(), model=MODEL)
    assert result.items == plan.items > 0
    for figure in result.figures.values():
        assert math.isfinite(figure["value"])
    text = json.dumps([result.to_dict(), result.records])
    for word in ("matrix", "a stream", "ünïcode", "stream of"):  # what the made items consist of
        assert word not in text.replace("reading_streams", "").replace("matrix_keeping", "")


def test_mmlu_prompts_are_the_published_ones(data):
    task = parse("mmlu")
    items, examples = load(task, data)
    (first, *_) = blocks_of(task, items, examples, tokenizer(), 4096)
    case, item = first.make()[0], items[0]
    shown = "".join(f"{e.question}\nA. {e.choices[0]}\nB. {e.choices[1]}\nC. {e.choices[2]}\nD. {e.choices[3]}\n"
                    f"Answer: {'ABCD'[e.answer]}\n\n" for e in examples[item.subject][:5])
    wanted = ("The following are multiple choice questions (with answers) about "
              f"{item.subject.replace('_', ' ')}.\n\n{shown}{item.question}\nA. {item.choices[0]}\n"
              f"B. {item.choices[1]}\nC. {item.choices[2]}\nD. {item.choices[3]}\nAnswer:")
    assert len(case.requests) == 4
    for letter, (context, continuation) in zip("ABCD", case.requests, strict=True):
        assert context == tokenizer().encode(wanted, special=False)
        assert [*context, *continuation] == tokenizer().encode(f"{wanted} {letter}", special=False)
    assert 0 < first.prefix < len(case.requests[0][0])
    assert case.bytes == [1, 1, 1, 1]


@pytest.mark.parametrize(("name", "context", "continuation"), [
    ("arc_easy", "Question: Q?\nAnswer:", " x"), ("piqa", "Question: Q?\nAnswer:", " x"),
    ("openbookqa", "Q?", " x"), ("hellaswag", "C", " x"), ("boolq", "C\nQuestion: Q?\nAnswer:", " x"),
    ("socialiqa", "Q: C Q?\nA:", " x"), ("csqa:letter", "C\nQ?\nA. x\nB. y z\nAnswer:", " A"),
])
def test_wording(name, context, continuation, tmp_path):
    task = parse(name)
    (tmp_path / f"{task.file}.jsonl").write_text(json.dumps(
        {"id": 1, "question": "Q?", "context": "C", "choices": ["x", "y z"], "answer": 1}))
    item = read_items(tmp_path / f"{task.file}.jsonl", choices=True)[0]
    assert task.asks.ask(item)[0] == (context, continuation)


def test_winogrande_and_blanks_at_the_end_of_a_context():
    tok = tokenizer()
    for context, continuation in [("the model", " reads a stream"), ("the model \n", "reads"), ("", "the model"),
                                  ("the model", "s")]:
        ((before, after),) = encode_pairs(tok, [(context, continuation)])
        whole = tok.encode(context + continuation, special=False)
        assert [*before, *after] == (whole if context else [tok.eos, *whole])
        assert before == (tok.encode(context.rstrip(), special=False) if context else [tok.eos])
        assert after


def test_figures_by_hand(tmp_path):
    (tmp_path / "piqa_val.jsonl").write_text("".join(json.dumps(
        {"id": str(i), "question": "q", "choices": ["a", "bb ü"], "answer": i % 2}) + "\n" for i in range(4)))
    scores = [(-1.0, True), (-3.0, False)]  # the first has more; by the byte (1 and 5) the second
    scorer = types.SimpleNamespace(context=99, continuations=lambda r, prefix=0: scores * (len(r) // 2))
    result = run(planned("piqa", tmp_path), scorer, model=MODEL)
    record = result.records[1]
    assert (record["logprobs"], record["bytes"], record["correct"], record["correct_bytes"]) == (
        [-1.0, -3.0], [1, 5], False, True)
    assert result.figures["acc"] == {"value": 0.5, "stderr": pytest.approx(math.sqrt(0.25 / 3))}
    assert result.figures["bits_per_byte"]["value"] == pytest.approx((2 * 1 + 2 * 3) / math.log(2) / (2 * 1 + 2 * 5))


def test_standard_errors_against_the_bootstrap():
    rng = np.random.default_rng(0)
    sizes = rng.integers(5, 50, 400)
    bits = sizes * rng.normal(1.5, 0.4, 400)
    draws = [rng.integers(0, 400, 400) for _ in range(3000)]
    drawn = [bits[d].sum() / sizes[d].sum() for d in draws]
    assert ratio(bits, sizes)["stderr"] == pytest.approx(np.std(drawn), rel=0.05)
    assert mean(bits)["stderr"] == pytest.approx(np.std([bits[d].mean() for d in draws]), rel=0.05)


def files(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.mark.parametrize("damage", ["", "half a line", "no newline", "part of a block", "garbage"])
def test_an_interrupted_run_goes_on_and_gives_the_same_records(data, tmp_path, damage):
    plan = planned("mmlu", data)
    assert len(plan.blocks) == 2
    run(plan, Fake(), model=MODEL, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(plan, Fake(stop_after=1), model=MODEL, out=tmp_path / "part")
    records = tmp_path / "part" / "mmlu" / "records.jsonl"
    whole = (tmp_path / "whole" / "mmlu" / "records.jsonl").read_bytes()
    assert whole.startswith(records.read_bytes())
    lines = whole.splitlines(keepends=True)
    written = records.read_bytes()
    have = len(written.splitlines())
    records.write_bytes(written + {"": b"", "half a line": lines[have][:20], "no newline": lines[have][:-1],
                                   "part of a block": b"".join(lines[have:have + 3]),
                                   "garbage": b"\xff\n" + lines[have]}[damage])
    scorer = Fake()
    result = run(plan, scorer, model=MODEL, out=tmp_path / "part")
    assert len(scorer.calls) == 1
    assert result.resumed == 35
    assert records.read_bytes() == whole
    a, b = (json.loads((tmp_path / p / "mmlu" / "results.json").read_text()) for p in ("whole", "part"))
    assert a["figures"] == b["figures"]
    assert a["labels"] == b["labels"]
    again = files(tmp_path / "part" / "mmlu")
    assert run(plan, Fake(stop_after=0), model=MODEL, out=tmp_path / "part").figures == result.figures
    assert files(tmp_path / "part" / "mmlu") == again


def test_records_of_another_run_are_refused_and_kept(data, tmp_path):
    run(planned("piqa", data), Fake(), model=MODEL, out=tmp_path / "o")
    before = files(tmp_path / "o" / "piqa")
    with pytest.raises(DataError, match="another model"):
        run(planned("piqa", data), Fake(), model={**MODEL, "fingerprint": "1"}, out=tmp_path / "o")
    with pytest.raises(DataError, match="other items or settings"):
        run(planned("piqa", data, limit=3), Fake(), model=MODEL, out=tmp_path / "o")
    assert files(tmp_path / "o" / "piqa") == before


def test_an_item_too_long_for_the_context(data):
    with pytest.raises(DataError, match=r"mmlu: item mmlu_test-\d+ has \d+ tokens, the context 100; give a larger"):
        run(planned("mmlu", data, context=100), Fake(100), model=MODEL)
    scorer = Fake(100)
    result = run(planned("mmlu", data, context=100, truncate=True), scorer, model=MODEL)
    assert all(r["truncated"] for r in result.records)
    whole = {tuple(a + b) for requests, _ in _calls(planned("mmlu", data)) for a, b in requests}
    for requests, prefix in scorer.calls:
        assert prefix == 0 or not requests
        for context, continuation in requests:
            assert len(context) + len(continuation) - 1 == 100
            assert any(text[-101:] == tuple(context + continuation) for text in whole)


def _calls(plan):
    scorer = Fake()
    run(plan, scorer, model=MODEL)
    return scorer.calls


@pytest.mark.parametrize(("line", "message"), [
    ("{", "line 2 is not JSON"), ("[1]", "no JSON object"), ('{"question": "q", "choices": ["a", "b"], "answer": 0}',
                                                             "has no id"),
    ('{"id": "x", "question": "q", "choices": ["a", "b"], "answer": 2}', "not an index of its 2 choices"),
    ('{"id": "x", "question": "q", "choices": ["a", "b"], "answer": "A"}', "not an index"),
    ('{"id": "x", "question": "q", "choices": ["a"], "answer": 0}', "two or more"),
    ('{"id": "x", "question": "q", "choices": ["a", ""], "answer": 0}', "two or more"),
    ('{"id": "x", "choices": ["a", "b"], "answer": 0}', "neither question nor context"),
    ('{"id": "x", "question": 3, "choices": ["a", "b"], "answer": 0}', "'question' holds int"),
    ('{"id": "0", "question": "q", "choices": ["a", "b"], "answer": 0}', "occurs twice"),
])
def test_a_malformed_file_gets_one_clear_error(line, message, tmp_path):
    good = '{"id": "0", "question": "q", "choices": ["a", "b"], "answer": 0}\n'
    (tmp_path / "piqa_val.jsonl").write_text(good + line + "\n")
    with pytest.raises(DataError, match=message) as error:
        planned("piqa", tmp_path)
    assert "piqa_val.jsonl" in str(error.value)


def test_other_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match="has no piqa_val"):
        planned("piqa", tmp_path)
    (tmp_path / "piqa_val.jsonl.gz").write_bytes(gzip.compress(b"x" * 1000)[:20])
    with pytest.raises(DataError, match="damaged"):
        planned("piqa", tmp_path)
    (tmp_path / "boolq_val.jsonl").write_text("")
    with pytest.raises(DataError, match="holds no items"):
        planned("boolq", tmp_path)
    (tmp_path / "csqa_val.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="no Parquet file"):
        planned("csqa", tmp_path)
    (tmp_path / "lambada_openai_test.jsonl").write_text('{"id": 1, "context": "c"}\n')
    with pytest.raises(DataError, match="has no target"):
        planned("lambada", tmp_path)


def test_parquet_items_are_those_of_json_lines(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    made = bench_items.write(tmp_path, "piqa_val", 5)
    pq.write_table(pa.Table.from_pylist(made), tmp_path / "p.parquet")
    (file,) = tmp_path.glob("piqa_val*")
    assert read_items(tmp_path / "p.parquet", choices=True) == read_items(file, choices=True)


def test_names_that_do_not_exist(data):
    for name, shots, message in (("mmlux", None, "there are mmlu, arc_easy"), ("mmlu:bpb", None, "letter, cloze"),
                                 ("piqa", 3, "no worked examples"), ("mmlu", 9, "has 6 worked examples")):
        with pytest.raises((ConfigError, DataError), match=message):
            planned(name, data, shots=shots)


def test_hub_rows_become_items(monkeypatch):
    from hybridlm.evals import hub

    listed = {"id": "a", "question": "q", "question_stem": "q", "choices": {"text": ["x", "y"], "label": ["A", "B"]},
              "answerKey": "B"}
    samples = {
        "mmlu_test": {"question": "q", "choices": ["x", "y"], "answer": 1, "subject": "s"}, "arc_easy_test": listed,
        "openbookqa_val": listed, "csqa_val": listed,
        "hellaswag_val": {"activity_label": "A", "ctx_a": "b", "ctx_b": "c", "endings": ["x", "y [title] z"],
                          "label": "1"},
        "piqa_val": {"goal": "g", "sol1": "x", "sol2": "y", "label": 1},
        "winogrande_val": {"sentence": "a _ b", "option1": "x", "option2": "y", "answer": "2"},
        "boolq_val": {"passage": "p", "question": "q", "answer": True},
        "socialiqa_val": {"context": "c", "question": "q", "answerA": "x", "answerB": "y", "answerC": "z",
                          "label": "2"},
        "lambada_openai_test": {"text": "one two three"},
        "gsm8k_test": {"question": "q", "answer": "a <<1+1=2>>\n#### 1,002"},
        "humaneval_test": {"task_id": "h", "prompt": "p", "canonical_solution": "s", "test": "t", "entry_point": "e"},
        "mbpp_test": {"task_id": 1, "text": "t", "code": "c", "test_list": ["a"]},
    }
    import sys

    for name, row in samples.items():
        fake = types.SimpleNamespace(load_dataset=lambda repository, config, split, row=row: [row])
        monkeypatch.setitem(sys.modules, "datasets", fake)
        (item,) = hub.read(name, parse(next(t.name for t in TASKS.values() if t.file == name)).choices)
        assert item.answer == (1 if item.choices else -1)
        assert item.choices or item.target
        if name == "gsm8k_test":
            assert (item.target, item.extra["solution"]) == ("1002", "a <<1+1=2>>")
        if name == "hellaswag_val":
            assert (item.context, item.choices[1]) == ("A: b C", "y. z")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        hub.read("piqa_val", True)


def test_gsm8k_answers():
    assert gsm8k_score(" so 3 + 4 = 7\n#### 7", "7") == {"score": 1, "score_flexible": 1}
    assert gsm8k_score(" the answer is $1,234.", "1234") == {"score": 0, "score_flexible": 1}
    assert gsm8k_score("#### 1,234", "1234") == {"score": 1, "score_flexible": 1}
    assert gsm8k_score(" no number", "7") == {"score": 0, "score_flexible": 0}
    assert gsm8k_score("#### 8\nor 7", "7") == {"score": 0, "score_flexible": 1}


def test_generated_text_is_kept_apart_from_records(data, tmp_path):
    result = run(planned("gsm8k:generate", data), Fake(), model=MODEL, out=tmp_path)
    folder = tmp_path / "gsm8k_generate"
    outputs = [json.loads(line) for line in (folder / "outputs.jsonl").read_text().splitlines()]
    assert [o["output"].strip()[:5] for o in outputs] == ["so it"] * 8
    assert result.figures["score"]["value"] == 1  # the fake answers the numbers that the items have
    assert "so it" not in (folder / "records.jsonl").read_text()


def test_programs_run_only_when_asked_and_within_limits(data):
    made = run(planned("humaneval:generate", data), Fake(), model=MODEL)
    assert all(r["not_run"] and "score" not in r for r in made.records)
    assert made.figures == {}
    right = types.SimpleNamespace(context=4096, generate_until=lambda p, n, stop=(), prefix=0: [
        f"\n    return x + {i}" for i in range(len(p))])
    result = run(planned("humaneval:generate", data, run_code=True), right, model=MODEL)
    assert result.figures["score"]["value"] == 1
    assert passes("assert 1 + 1 == 2")
    for program in ("assert 1 + 1 == 3", "import sys; sys.exit(0)", "import os; os._exit(0)", "x = bytearray(1 << 33)",
                    "import subprocess; subprocess.run(['true'])", "open('f', 'wb').write(bytes(1 << 22))", "1 +"):
        assert not passes(program), program
