"""Every command on a micro model: what it prints, what its JSON holds, how mistakes end."""

import io
import json
import re

import numpy as np
import pytest

from hybridlm.cli import MAP, explain
from hybridlm.cli._common import count, printable, size
from hybridlm.engine import Engine
from hybridlm.errors import ConfigError

COMMANDS = [name for panel in MAP.values() for name in panel]


# -- the map ---------------------------------------------------------------------------------------------------------


def test_help_names_every_command(cli):
    code, out, _ = cli("--help")
    assert code == 0 and all(re.search(rf"│ {name}\b", out) for name in COMMANDS)
    assert cli()[1] == out  # nothing given: the same
    assert cli("--version")[1].startswith("hybridlm ")


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(cli, command):
    code, out, err = cli(command, "--help")
    assert code == 0 and f"hybridlm {command}" in out and not err


@pytest.mark.parametrize("arguments, code, words", [
    (["nope"], 2, "No such command 'nope'"),
    (["generate"], 2, "Missing argument 'MODEL'"),
    (["generate", "x", "y", "--frobnicate"], 2, "No such option"),
    (["bench"], 2, "give a MODEL or --preset"),
    (["bench", "--preset", "8b"], 1, "'8b' is unknown"),
    (["bench", "--preset", "tiny", "--type", "q9_9", "--no-probe"], 1, "q9_9"),
    (["train", "tiny", "data"], 2, "'data' is not KEY=VALUE"),
    (["train", "tiny", "seed=1", "seed=2"], 2, "given twice"),
    (["inspect", "absent.gguf"], 1, "no such file"),
    (["convert", "absent/", "out.gguf"], 1, "no such file"),
    (["quantize", "absent.gguf", "out.gguf"], 1, "absent.gguf"),
    (["eval", "bpb", "absent.gguf", "x"], 1, "absent.gguf"),
    (["tokenizer", "inspect", "absent"], 1, "cannot be read"),
    (["tokenizer", "train", "absent", "--out", "x"], 1, "absent"),
])
def test_mistakes_are_one_line(cli, tmp_path, monkeypatch, arguments, code, words):
    monkeypatch.chdir(tmp_path)
    got, out, err = cli(*arguments)
    assert got == code and words in err and not out
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err


def test_what_a_bug_looks_like():
    assert explain(ConfigError("x"), None) == "x"
    assert "pip install" in explain(ModuleNotFoundError("no", name="torch.nn"), "train")
    assert explain(ModuleNotFoundError("no", name="hybridlm.nope"), "train") is None
    assert explain(ValueError("x"), None) is None
    assert explain(FileNotFoundError(2, "No such file or directory", "y"), None) == "y: No such file or directory"


def test_numbers_for_people():
    assert [size(n) for n in (0, 999, 1500, 4.2e9)] == ["0 B", "999 B", "1.5 kB", "4.2 GB"]
    assert [count(n) for n in (193_736, 22_300_000, 7_430_870_688)] == ["194k", "22.3M", "7.43B"]
    assert printable("a\x1b[2Jb\r\n\tc\x9b\u202fd") == "a[2Jb\n\tc\u202fd"


# -- generate --------------------------------------------------------------------------------------------------------


def test_generate_streams_what_the_engine_says(cli, gguf):
    code, out, err = cli("generate", gguf, "the cat", "-n", 20, "--temperature", 0, "--stats", "--echo")
    with Engine.open(gguf) as engine:
        g = engine.generate("the cat", max_tokens=20, temperature=0)
        expected = "".join(piece.text for piece in g)
    assert code == 0 and out == f"the cat{expected}\n"
    assert re.search(r"prompt 2 tokens, .* generated \d+ tokens, .* peak memory", err)


def test_generate_json(cli, gguf):
    found = cli("generate", gguf, "the cat", "-n", 8, "--seed", 1, "--json", json_=True)[1]
    assert {"text", "tokens", "prompt_tokens", "reused_tokens", "prefill_tokens_per_s", "decode_tokens_per_s",
            "peak_rss_bytes", "model_bytes"} <= set(found)
    assert found["prompt_tokens"] == 2 and found["reused_tokens"] == 0 and found["generated_tokens"] <= 8
    assert found["tokens"] == cli("generate", gguf, "the cat", "-n", 8, "--seed", 1, "--json", json_=True)[1]["tokens"]
    with Engine.open(gguf) as engine:
        assert engine.tokenizer.decode(found["tokens"]) == found["text"]


def test_generate_from_a_pipe_a_folder_and_to_a_stop(cli, micro, gguf, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat"))
    piped = cli("generate", gguf, "-n", 12, "--seed", 5, "--json", json_=True)[1]
    given = cli("generate", micro, "the cat", "-n", 12, "--seed", 5, "--json", json_=True)[1]  # converted on the way
    assert piped["text"] == given["text"]
    stop = given["text"][3:5]
    cut = cli("generate", gguf, "the cat", "-n", 12, "--seed", 5, "--stop", stop, "--json", json_=True)[1]
    assert cut["finish_reason"] == "stop" and given["text"].startswith(cut["text"] + stop)


def test_generate_answers_by_the_template(cli, gguf, base):
    plain = cli("generate", gguf, "the cat", "-n", 1, "--json", json_=True)[1]["prompt_tokens"]
    assert cli("generate", gguf, "the cat", "-n", 1, "--json", "--chat", json_=True)[1]["prompt_tokens"] > plain
    code, _, err = cli("generate", base, "the cat", "--chat")
    assert code == 1 and "no chat template" in err


def test_generate_refuses_what_cannot_be(cli, gguf):
    assert "context" in cli("generate", gguf, "the cat " * 600)[2]
    assert "temperature" in cli("generate", gguf, "the cat", "--temperature", -1)[2]
    assert "kv_type" in cli("generate", gguf, "the cat", "--kv-type", "q2")[2]


# -- bench -----------------------------------------------------------------------------------------------------------


def test_bench_counts_what_it_says(cli, gguf):
    f = cli("bench", gguf, "-p", 40, "-g", 6, "-r", 2, "-t", 1, "--no-probe", "--json", json_=True)[1]
    assert (f["prompt_tokens"], f["generated_tokens"], f["threads"], f["repeats"]) == (40, 6, 1, 2)
    assert f["model_bytes"] == gguf.stat().st_size and f["peak_rss_bytes"] > f["model_bytes"]
    assert min(f["prefill_tokens_per_s"], f["decode_tokens_per_s"]) > 0
    with Engine.open(gguf) as engine:
        assert f["decode_bytes_per_token"] == engine.decode_bytes_per_token(43)
        # weights without the input table, which is not the head here, and state in and out, keys and values
        weights = sum(t.nbytes for n, t in engine._file.tensors.items() if n != "token_embd.weight")
        assert f["decode_bytes_per_token"] == pytest.approx(weights + 2 * f["state_bytes"] + 44 * 64 * 2 * 2, rel=0.05)


def test_bench_of_a_preset_and_its_table(cli, monkeypatch):
    monkeypatch.setattr("hybridlm.cli.bench.PROBE_BYTES", 1 << 20)
    code, out, _ = cli("bench", "--preset", "tiny", "--type", "q8_0", "-p", 16, "-g", 2, "-r", 1, "-c", "40,0")
    assert code == 0 and all(words in out for words in ("prefill, 16 tokens", "decode, 2 tokens", "the machine reads",
                                                        "1.5M parameters", "peak memory", "context", "share"))
    f = cli("bench", "--preset", "tiny", "-p", 4, "-g", 2, "-r", 1, "-c", "40,0", "--no-probe", "--json", json_=True)[1]
    assert [row["context"] for row in f["contexts"]] == [0, 40]
    assert all(row["decode_tokens_per_s"] > 0 for row in f["contexts"]) and f["contexts"][1]["prefill_tokens_per_s"] > 0
    assert "0,4096,8192" in cli("bench", "--preset", "tiny", "-c", "deep", "--no-probe")[2]


# -- files -----------------------------------------------------------------------------------------------------------


def test_convert_quantize_inspect(cli, micro, tmp_path):
    bf16, q4 = tmp_path / "m.gguf", tmp_path / "q.gguf"
    assert cli("convert", micro, bf16, "--type", "bf16")[0] == 0
    made = cli("quantize", bf16, q4, "--type", "q4_0", "--json", json_=True)[1]
    assert made["bytes"] == q4.stat().st_size < bf16.stat().st_size and made["type"] == "q4_0"
    facts = cli("inspect", q4, "--json", json_=True)[1]
    assert facts["parameters"] == made["parameters"] and facts["types"]["q4_0"]["tensors"] > 0
    assert facts["has_tokenizer"] and facts["has_chat_template"]
    assert sum(np.prod(t["shape"]) for t in facts["tensors"]) == facts["parameters"]
    out = cli("inspect", q4, "--tensors", "--metadata")[1]
    for words in ("2 Gated DeltaNet, 1 attention", "no positions (NoPE)", "blk.2.attn_q.weight", "hybridlm.config = "):
        assert words in out
    assert cli("quantize", bf16, bf16)[0] == 1
    assert "is a folder" in cli("quantize", micro, q4)[2]
    assert "GGUF file already" in cli("convert", bf16, q4)[2]
    assert "cannot be written" in cli("convert", micro, q4, "--type", "iq2_xxs")[2]


def test_quantize_by_what_matters(cli, micro, tmp_path):
    bf16, text, matrix = tmp_path / "m.gguf", tmp_path / "a.txt", tmp_path / "m.imatrix"
    text.write_text("the cat sat on the mat, 12345 times; naïve façade " * 20)
    cli("convert", micro, bf16, "--type", "bf16")
    made = {}
    for name, options in {"plain": [], "read": ["--calibrate", text, "--imatrix", matrix], "kept": ["--imatrix", matrix]
                          }.items():
        assert cli("quantize", bf16, tmp_path / name, "--type", "q4_0", *options)[0] == 0
        made[name] = (tmp_path / name).read_bytes()
    assert made["read"] == made["kept"] != made["plain"]
    assert "no importance matrix" in cli("quantize", bf16, tmp_path / "x", "--imatrix", bf16)[2]


def test_eval_bpb_is_the_formula(cli, gguf, tmp_path):
    text = "the cat sat on the mat, 12345 times; naïve façade\n" * 3
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": text}) + "\n")
    one = cli("eval", "bpb", gguf, tmp_path / "a.txt", "--json", json_=True)[1]
    with Engine.open(gguf) as engine:
        ids = [0, *engine.tokenizer.encode(text, special=False)]
        x = engine.logits(ids).astype(np.float64)
    logprobs = x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)
    bits = -sum(logprobs[t, ids[t + 1]] for t in range(len(ids) - 1)) / np.log(2)
    assert one["bytes"] == len(text.encode()) and one["bits_per_byte"] == pytest.approx(bits / one["bytes"], rel=1e-4)
    both = cli("eval", "bpb", gguf, tmp_path / "a.txt", tmp_path / "b.jsonl", "--json", json_=True)[1]
    assert both["documents"] == 2 and both["bits_per_byte"] == pytest.approx(one["bits_per_byte"], rel=1e-3)
    assert "bits per byte (1 documents" in cli("eval", "bpb", gguf, tmp_path / "a.txt")[1]


def test_tokenizer(cli, tmp_path, gguf):
    (tmp_path / "a.txt").write_text("the cat sat on the mat " * 20)
    code, out, _ = cli("tokenizer", "train", tmp_path / "a.txt", "--vocab", 270, "--out", tmp_path / "tok")
    assert code == 0 and "270 entries" in out
    facts = cli("tokenizer", "inspect", tmp_path / "tok", "--text", "the cat", "--json", json_=True)[1]
    assert facts["vocab_size"] == 270 and "".join(facts["pieces"]) == "the cat" and facts["eos"] == 0
    assert "<|im_end|> 3" in cli("tokenizer", "inspect", gguf)[1]


def test_train_lists_recipes(cli):
    pytest.importorskip("torch")
    out = cli("train")[1]
    assert "tiny" in out and "760m-twin" in out and "model.FIELD" in out
