"""Bits per byte against sums made by hand, and the PyTorch scorer against float64 logits."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.data.helpers import text, tokenizer

from hybridlm.config import FULL, LINEAR, HybridConfig, Rope
from hybridlm.data import Document, Source, tokenize
from hybridlm.errors import ConfigError, DataError
from hybridlm.evals import bits_per_byte, documents_of
from hybridlm.evals import torch_scorer as room
from hybridlm.evals.bits_per_byte import spans_of
from hybridlm.evals.torch_scorer import TorchScorer
from hybridlm.model import HybridLM
from hybridlm.train.validate import validate

torch.set_num_threads(1)


class Halving:
    """A scorer whose n-th token of a window has probability 2^-(n + token mod 3), and which notes what it read."""

    def __init__(self, context=1000):
        self.context = context
        self.read = []

    def score(self, texts):
        self.read += [list(t) for t in texts]
        return [np.array([-math.log(2) * (n + t[n] % 3) for n in range(1, len(t))], np.float32) for t in texts]

    def logprobs(self, tokens):
        return self.score([tokens])[0]


def test_by_hand(tmp_path):
    tok, documents = tokenizer(), ["ünïcode 字", "the model reads"]
    (tmp_path / "a.txt").write_text(documents[0], encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": documents[1], "domain": "x"}) + "\n")
    scorer = Halving()
    found = bits_per_byte(scorer, tok, documents_of([tmp_path / "a.txt", tmp_path / "b.jsonl"]))
    ids = [tok.encode(d) for d in documents]
    bits = [sum(n + t % 3 for n, t in enumerate(i, 1)) for i in ids]
    assert scorer.read == [[tok.eos, *i] for i in ids]
    assert (found.bytes, found.tokens, found.documents) == (13 + 15, len(ids[0]) + len(ids[1]), 2)
    assert found.bits_per_byte == pytest.approx(sum(bits) / 28)
    assert found.labels["x"].bits_per_byte == pytest.approx(bits[1] / 15)


def test_a_large_plain_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text(text(1, 2000), encoding="utf-8")
    assert [d.text for d in documents_of([tmp_path / "a.txt"])] == [(tmp_path / "a.txt").read_text(encoding="utf-8")]


@given(st.integers(1, 300), st.integers(2, 60))
def test_windows_count_every_prediction_once_with_half_a_context_before_it(length, limit):
    counted = []
    for start, end, skip in spans_of(length, limit):
        assert 0 <= start < end <= length
        assert end - start <= limit
        mine = list(range(start + 1 + skip, end))
        assert start == 0 or not mine or mine[0] - start >= limit - limit // 2 - 1
        counted += mine
    assert counted == list(range(1, length))


def test_no_text_and_impossible_windows():
    with pytest.raises(DataError, match="no text"):
        bits_per_byte(Halving(), tokenizer(), [])
    with pytest.raises(ConfigError, match="context"):
        bits_per_byte(Halving(), tokenizer(), [Document("a")], context=1)


@pytest.fixture(scope="module")
def model():
    config = HybridConfig(vocab_size=384, hidden_size=32, intermediate_size=48, layer_types=(LINEAR, LINEAR, FULL),
                          num_attention_heads=2, rope=Rope(1e4), tie_word_embeddings=True, max_position_embeddings=128)
    made = HybridLM(config)
    for parameter in made.parameters():  # away from the even distribution that small weights give
        parameter.data.mul_(3)
    return made


def exact(model, ids):
    wide = HybridLM(model.config).double()
    wide.load_state_dict(model.state_dict())
    with torch.no_grad():
        logprobs = wide(torch.tensor([ids]))[0, :-1].log_softmax(-1)
    return logprobs[torch.arange(len(ids) - 1), torch.tensor(ids[1:], dtype=torch.long)].numpy()


@pytest.mark.parametrize("rows", [5, 64, 4096])
def test_the_torch_scorer_at_any_length(model, monkeypatch, rows):
    """`rows` = 5 makes every longer text go on from the cache."""
    monkeypatch.setattr(room, "_ROWS", rows)
    rng = np.random.default_rng(0)
    texts = [rng.integers(384, size=n).tolist() for n in (2, 100, 1, 33, 34, 7)]
    found = TorchScorer(model).score(texts)
    for ids, scores in zip(texts, found, strict=True):
        assert scores.shape == (len(ids) - 1,)
        np.testing.assert_allclose(scores, exact(model, ids), atol=2e-4)
    np.testing.assert_allclose(TorchScorer(model).logprobs(texts[1]), found[1], atol=2e-4)


def test_validation_while_training_agrees_with_the_exact_sum(model, tmp_path):
    tok, documents = tokenizer(), [text(i, 30 + 10 * i) for i in range(5)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": d, "domain": "ab"[i % 2]}) + "\n"
                                              for i, d in enumerate(documents)))
    stream = tokenize(Source.open(tmp_path / "a.jsonl"), tok, tmp_path / "out").train
    with torch.no_grad():
        found = validate(model.hidden, lambda: model.head_weight, stream, sequence=50, rows=3)
    wanted = {"a": 0.0, "b": 0.0}
    for i, document in enumerate(documents):
        ids = [tok.eos, *tok.encode(document, special=False)]
        for at in range(0, len(ids) - 1, 50):
            wanted["ab"[i % 2]] -= exact(model, ids[at:at + 51]).sum() / math.log(2)
    size = {label: sum(len(d.encode()) for d in documents["ab".index(label)::2]) for label in "ab"}
    for label in "ab":
        assert found[label].nbytes == size[label]
        assert found[label].per_byte == pytest.approx(wanted[label] / size[label], rel=1e-5)
    assert found["all"].per_byte == pytest.approx(sum(wanted.values()) / sum(size.values()), rel=1e-5)


@pytest.mark.parametrize("prefix", [0, 40])
@pytest.mark.parametrize("rows", [64, 4096])
def test_continuations_of_the_torch_scorer(model, monkeypatch, rows, prefix):
    monkeypatch.setattr(room, "_ROWS", rows)
    rng = np.random.default_rng(1)
    head = rng.integers(384, size=40).tolist()
    asked = [([*head, *rng.integers(384, size=n).tolist()], rng.integers(384, size=m).tolist())
             for n, m in ((1, 1), (30, 4), (7, 1), (7, 12), (29, 2))]
    asked.append((asked[0][0], [int(np.argmax(greedy_logits(model, asked[0][0])))]))
    found = TorchScorer(model).continuations(asked, prefix)
    for (context, continuation), (logprob, greedy) in zip(asked, found, strict=True):
        wanted = exact(model, [*context, *continuation])[len(context) - 1:]
        assert logprob == pytest.approx(wanted.sum(), abs=3e-4)
        assert greedy == (continuation == [int(np.argmax(greedy_logits(model, [*context, *continuation[:i]])))
                                           for i in range(len(continuation))])
    assert found[-1][1]
    assert TorchScorer(model).continuations([]) == []


def greedy_logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids]))[0, -1].numpy()


def test_greedy_text_of_the_torch_scorer(model):
    tok = tokenizer()
    scorer = TorchScorer(model, tokenizer=tok)
    prompt = tok.encode("the model reads")
    written = []
    for _ in range(10):
        written.append(int(np.argmax(greedy_logits(model, [*prompt, *written]))))
    text = tok.decode(written[:written.index(tok.eos)] if tok.eos in written else written)
    assert scorer.generate_until([prompt, prompt], 10) == [text, text]
    stop = text[4:6]
    assert scorer.generate_until([prompt], 10, (stop,)) == [text[:text.index(stop)]]
    with pytest.raises(ConfigError, match="tokenizer"):
        TorchScorer(model).generate_until([prompt], 1)


def test_by_position(tmp_path):
    """Bits of a prediction with n tokens of context go to n's octave, in windows too."""
    tok, documents = tokenizer(), [text(1, 200), text(2, 20)]
    ids = [[tok.eos, *tok.encode(d)] for d in documents]
    found = bits_per_byte(Halving(), tok, [Document(d) for d in documents])
    wanted = {}
    for tokens in ids:
        for n in range(1, len(tokens)):
            sums = wanted.setdefault(max(5, n.bit_length()), [0, 0, 0])
            sums[0] += n + tokens[n] % 3
            sums[1] += len(tok.token_bytes(tokens[n]))
            sums[2] += 1
    assert [(a, b, round(p.bits), p.bytes, p.tokens) for a, b, p in found.by_position()] == [
        (0 if k == 5 else 1 << k >> 1, 1 << k, *wanted[k]) for k in sorted(wanted)]
    short = bits_per_byte(Halving(64), tok, [Document(d) for d in documents])
    assert sum(p.bytes for _, _, p in short.by_position()) == short.bytes
    assert max(b for _, b, _ in short.by_position()) == 64
