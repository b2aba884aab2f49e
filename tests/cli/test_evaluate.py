"""`hybridlm eval TASK` and `hybridlm verify` from the command line, on the micro model."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tests.evals import bench_items


@pytest.fixture
def data(tmp_path):
    for name in ("mmlu_test", "mmlu_dev", "piqa_val", "lambada_openai_test", "gsm8k_test"):
        bench_items.write(tmp_path / "data", name, 12)
    return tmp_path / "data"


def test_without_arguments_the_tasks_are_listed(cli):
    code, out, _ = cli("eval")
    assert code == 0
    for name in ("bpb", "mmlu", "hellaswag", "ruler_niah_single_1", "letter, cloze"):
        assert name in out


def test_tasks_to_a_folder_and_again(cli, gguf, data, tmp_path):
    arguments = ("eval", "mmlu,piqa,piqa:letter,lambada", gguf, "--data", data, "--out", tmp_path / "o", "--context",
                 "8192")
    code, out, _ = cli(*arguments)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["mmlu", "piqa", "piqa:letter", "lambada"]
    records = {p: p.read_bytes() for p in (tmp_path / "o").rglob("records.jsonl")}
    assert len(records) == 4
    again = cli(*arguments, "--json", json_=True)[1]["results"]
    assert [r["resumed_items"] for r in again] == [12, 12, 12, 12]
    assert {p: p.read_bytes() for p in (tmp_path / "o").rglob("records.jsonl")} == records
    assert again[0]["model"]["name"] == "micro"
    assert len(again[0]["labels"]) == 2


def test_an_interrupted_run_goes_on_with_equal_bytes(cli, gguf, data, tmp_path, monkeypatch):
    from hybridlm.engine import Engine

    bench_items.write(data, "piqa_val", 150)
    whole = ("eval", "piqa", gguf, "--data", data, "--out")
    assert cli(*whole, tmp_path / "a")[0] == 0
    real, calls = Engine.continuations, []

    def interrupted(self, requests, prefix=0):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, requests, prefix)

    monkeypatch.setattr(Engine, "continuations", interrupted)
    code, _, err = cli(*whole, tmp_path / "b")
    assert code == 130
    assert "the same command goes on" in err
    monkeypatch.undo()
    records = tmp_path / "b" / "piqa" / "records.jsonl"
    assert len(records.read_bytes().splitlines()) == 64
    assert cli(*whole, tmp_path / "b")[0] == 0
    assert records.read_bytes() == (tmp_path / "a" / "piqa" / "records.jsonl").read_bytes()


def test_ruler_and_generation(cli, gguf, data, tmp_path):
    tasks = "ruler_niah_single_1,ruler_niah_multiquery,gsm8k:generate"
    found = cli("eval", tasks, gguf, "--data", data, "--lengths", "1024", "--samples", "2", "--context", "1024",
                "--limit", "2", "--out", tmp_path / "o", "--json", json_=True)[1]["results"]
    assert [r["task"] for r in found] == ["ruler_niah_single_1@1024", "ruler_niah_multiquery@1024", "gsm8k:generate"]
    assert all(r["items"] == 2 and 0 <= r["figures"]["score"]["value"] <= 1 for r in found)
    assert found[0]["settings"]["haystack"] == "own haystack: made sentences"


@pytest.mark.parametrize(("arguments", "message"), [
    (("nosuch", "MODEL", "--data", "DATA"), "there are mmlu"),
    (("piqa", "MODEL"), "give the folder"),
    (("csqa", "MODEL", "--data", "DATA"), "has no csqa_val"),
    (("mmlu", "MODEL", "--data", "DATA", "--context", "64"), "give a larger --context"),
    (("ruler_vt", "MODEL"), "--context 4096 reads on"),
    (("ruler_qa_1", "MODEL"), "give --data DIR"),
])
def test_mistakes_get_one_line(cli, gguf, data, arguments, message, monkeypatch):
    monkeypatch.delenv("HYBRIDLM_DATA", raising=False)
    code, _, err = cli("eval", *[{"MODEL": gguf, "DATA": data}.get(a, a) for a in arguments])
    assert code == 1
    assert message in err
    assert err.count("\n") == 1


def test_wrong_usage(cli, gguf):
    for arguments in (("piqa",), ("piqa", gguf, "file"), ("bpb", gguf), ("ruler", gguf, "--lengths", "x")):
        assert cli("eval", *arguments)[0] == 2


def test_verify(cli, gguf, base, tmp_path):
    code, out, _ = cli("verify", gguf, "-n", "120")
    assert code == 0, out
    assert "11 of 11 pairs agree" in out
    (tmp_path / "t.txt").write_text("the model reads a stream of words " * 10)
    same = cli("verify", gguf, "--against", gguf, "--text", tmp_path / "t.txt", "--json", json_=True)
    assert same[0] == 0
    assert same[1]["pairs"][0]["mean_kl"] == 0


def test_verify_finds_another_model(cli, gguf, micro, tmp_path):
    from tests.cli.micro import write_micro

    from hybridlm.formats.convert import convert

    convert(write_micro(tmp_path / "m", seed=1), tmp_path / "m.gguf", "q8_0")
    code, out, _ = cli("verify", gguf, "--against", tmp_path / "m.gguf", "-n", "60")
    assert code == 1
    assert "FAILED" in out
    assert "mean KL" in out
    convert(write_micro(tmp_path / "v", vocab_size=448), tmp_path / "v.gguf", "q8_0")
    code, _, err = cli("verify", gguf, "--against", tmp_path / "v.gguf")
    assert code == 1
    assert "another tokenizer" in err


def test_verify_against_pytorch(cli, micro, tmp_path):
    from hybridlm.formats.convert import convert

    convert(micro, tmp_path / "m.gguf", "f32")
    found = cli("verify", tmp_path / "m.gguf", "--torch", micro, "-n", "100", "--json", json_=True)
    assert found[0] == 0, found
    (pair,) = found[1]["pairs"]
    assert pair["reference"] == "PyTorch float32"
    assert 0 < pair["mean_kl"] < 1e-6


def test_bits_per_byte_by_position(cli, gguf, tmp_path):
    rng = np.random.default_rng(0)
    text = "".join(rng.choice(list("abc def")) for _ in range(400))
    (tmp_path / "a.txt").write_text(text)
    found = cli("eval", "bpb", gguf, tmp_path / "a.txt", "--json", json_=True)[1]
    parts = found["positions"]
    assert sum(p["bytes"] for p in parts) == found["bytes"] == 400
    assert sum(p["tokens"] for p in parts) == found["tokens"]
    assert sum(p["bits_per_byte"] * p["bytes"] for p in parts) / 400 == pytest.approx(found["bits_per_byte"], rel=1e-6)
    assert [p["first"] for p in parts][:2] == [0, 32]
    assert json.dumps(found)
