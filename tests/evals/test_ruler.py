"""RULER: NVIDIA's scoring rule on its cases, and each task's answer found by a solver that only reads the prompt."""

from __future__ import annotations

import json
import re
from collections import Counter

import numpy as np
import pytest
from tests.data.helpers import tokenizer
from tests.evals import bench_items

from hybridlm.errors import ConfigError, DataError
from hybridlm.evals import ruler
from hybridlm.evals.ruler_tasks import TASKS
from hybridlm.evals.run import run


@pytest.mark.parametrize(("text", "answers", "every", "some"), [
    ("the numbers are 123 and 456", ["123", "456"], 1.0, 1.0),
    ("only 123 here", ["123", "456"], 0.5, 1.0),
    ("nothing", ["123", "456"], 0.0, 0.0),
    ("ABC in capitals", ["abc"], 1.0, 1.0),
    ("a1234b", ["123"], 1.0, 1.0),  # part of a word counts
    ("two of three: x y", ["x", "y", "q"], 2 / 3, 1.0),
    ("", ["x"], 0.0, 0.0),
])
def test_the_scoring_rule(text, answers, every, some):
    """string_match_all is the mean over the references, string_match_part the maximum; case is ignored in both."""
    assert ruler.score_all(text, answers) == pytest.approx(every)
    assert ruler.score_any(text, answers) == some


def niah(prompt):
    asked = re.search(r"What (?:is|are all) the special magic (\w+?)s? for (.*?) mentioned in", prompt)
    keys = re.split(r", and |, ", asked[2])
    facts = re.findall(r"One of the special magic \w+ for (\S+) is: (\S+?)\.(?=\s)", prompt)
    return [v for key in keys for k, v in facts if k == key]


def vt(prompt):
    text = prompt.split("\n\n")[-1] if prompt.count("Memorize") == 1 else prompt[prompt.rindex("Memorize"):]
    value = re.search(r"assigned the value (\d+)", text)[1]
    held = {}
    for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", text):
        held[name] = held.get(source, source)
    return [name for name, found in held.items() if found == value]


def cwe(prompt):
    listed = Counter(re.findall(r"\d+\. (\S+)", prompt[prompt.rindex("Below"):]))
    return [w for w, _ in listed.most_common(10)]


def fwe(prompt):
    text = prompt.split("coded words. ", 1)[1].split("\nQuestion")[0]
    counts = Counter(text.split()).most_common(5)
    assert counts[0][0] == "...."
    assert counts[3][1] > counts[4][1]  # the third and the fourth word do not tie
    return [w for w, _ in counts[1:4]]


def solve(name, prompt):
    return niah(prompt) if name.startswith("niah") else {"vt": vt, "cwe": cwe, "fwe": fwe}[name](prompt)


@pytest.mark.parametrize("name", [n for n in TASKS if not n.startswith("qa")])
@pytest.mark.parametrize("length", [2048, 8192])
def test_a_solver_finds_every_answer(name, length):
    (plan,) = ruler.plans(f"ruler_{name}", tokenizer(), lengths=[length], samples=6, seed=3)
    task, tok = TASKS[name], tokenizer()
    seen = set()
    for block in plan.blocks:
        for prompt in block.make():
            text = tok.decode(prompt.tokens)
            assert len(prompt.tokens) + task.max_tokens <= length
            assert len(prompt.tokens) + task.max_tokens > 0.85 * length  # as large as it may be
            found = solve(name, text)
            assert prompt.grade(" ".join(found))["score"] == 1
            assert prompt.grade(" ".join(found[1:]))["score"] == pytest.approx((len(found) - 1) / len(found))
            assert prompt.grade("no answer")["score"] == 0
            seen.add(text)
            assert text == tok.decode(block.make()[0].tokens) or len(block.ids) > 1
    assert len(seen) == 6


def test_needles_are_where_the_depths_say():
    task = TASKS["niah_single_1"]
    corpus = ruler._corpus(None, ())
    depths = [len(s.prompt.split("One of the special")[0]) / len(s.prompt)
              for s in (task.make(np.random.default_rng(i), 200, corpus) for i in range(200))]
    assert min(depths) < 0.1
    assert max(depths) > 0.9
    assert np.mean(depths) == pytest.approx(0.5, abs=0.07)


def test_question_answering_from_files(tmp_path):
    made = bench_items.rows("squad_val1000", 30)
    for i, row in enumerate(made):
        row |= {"context": f"{row['context']} secret{i}x.", "target": f"secret{i}x", "answers": [f"secret{i}x", "none"]}
    (tmp_path / "squad_val1000.jsonl").write_text("".join(json.dumps(r) + "\n" for r in made))
    hotpot = [{"question": f"q{i}?", "answer": f"secret{i}y", "context": [["T", [f"It is secret{i}y.", " Yes."]],
                                                                         [f"U{i}", ["Else."]]]} for i in range(30)]
    (tmp_path / "hotpot_dev_distractor_v1.json").write_text(json.dumps(hotpot))
    for name in ("ruler_qa_1", "ruler_qa_2"):
        (plan,) = ruler.plans(name, tokenizer(), lengths=[1024], samples=5, data=tmp_path)
        for block in plan.blocks:
            for prompt in block.make():
                text = tokenizer().decode(prompt.tokens)
                assert len(prompt.tokens) + 32 <= 1024
                assert text.count("Document ") > 3
                secrets = re.findall(r"secret\d+.", text)
                scores = [prompt.grade(s)["score"] for s in secrets]
                assert sum(scores) == 1  # one of the documents holds the answer
    with pytest.raises(DataError, match="squad_val1000"):
        ruler.plans("ruler_qa_1", tokenizer(), lengths=[1024], samples=1, data=tmp_path / "no")
    (tmp_path / "hotpot_dev_distractor_v1.json").write_text("[{}]")
    with pytest.raises(DataError, match="not HotpotQA"):
        ruler.plans("ruler_qa_2", tokenizer(), lengths=[1024], samples=1, data=tmp_path)


def test_a_users_haystack_and_mistakes(tmp_path):
    (tmp_path / "book.txt").write_text(" ".join(f"Sentence number {i} of the book." for i in range(500)))
    (plan,) = ruler.plans("ruler_niah_single_2", tokenizer(), lengths=[1024], samples=1, haystack=tmp_path / "book.txt")
    text = tokenizer().decode(plan.blocks[0].make()[0].tokens)
    assert text.count("of the book.") > 5
    assert "own haystack: sha256" in plan.settings["haystack"]
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(DataError, match="a book's length"):
        ruler.plans("ruler_vt", tokenizer(), lengths=[1024], samples=1, haystack=tmp_path / "short.txt")
    for name, data, lengths, message in (("ruler_x", None, [4096], "unknown"), ("ruler_vt", None, [100], "too few"),
                                         ("ruler_qa_1", None, [4096], "--data DIR")):
        with pytest.raises(ConfigError, match=message):
            ruler.check(name, data, lengths)
    (plan,) = ruler.plans("ruler_cwe", tokenizer(), lengths=[512], samples=1)
    with pytest.raises(ConfigError, match="too few for this task"):
        plan.blocks[0].make()


def test_a_run_gives_the_mean(tmp_path):
    """A model that copies the whole prompt has every answer."""
    tok = tokenizer()

    class Copies:
        context = 4096

        def generate_until(self, prompts, max_tokens, stop=(), prefix=0):
            return [tok.decode(p) for p in prompts]

    class Silent:
        context = 4096

        def generate_until(self, prompts, max_tokens, stop=(), prefix=0):
            return [""] * len(prompts)

    (plan,) = ruler.plans("ruler_niah_multivalue", tok, lengths=[2048], samples=5)
    result = run(plan, Copies(), model={}, out=tmp_path)
    assert result.figures["score"] == {"value": 1, "stderr": 0}
    assert result.items == 5
    others = [run(ruler.plans(name, tok, lengths=[2048], samples=2)[0], scorer, model={})
              for name, scorer in (("ruler_fwe", Copies()), ("ruler_niah_single_1", Silent()))]
    assert ruler.means([result, *others]) == {2048: (pytest.approx(2 / 3), 0, 3)}
    assert ruler.means([result]) == {}
    assert ruler.available(None)[1] == ["ruler_qa_1", "ruler_qa_2"]
    assert len(ruler.available(None)[0]) == 11
