"""`TorchScorer`: a PyTorch `HybridLM` as a `Scorer`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from hybridlm.errors import ConfigError
from hybridlm.model import HybridLM
from hybridlm.model.cache import Cache
from hybridlm.text import Tokenizer

__all__ = ["TorchScorer"]

_ROWS = 4096  # tokens of one forward pass; a longer text goes on from the cache
_HEAD = 1024  # tokens whose logits exist at a time


class TorchScorer:
    """Scores on the device and in the dtype that the model is in."""

    def __init__(self, model: HybridLM, *, context: int | None = None, tokenizer: Tokenizer | None = None) -> None:
        """`tokenizer`: for `generate_until` alone."""
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.context = context or model.config.max_position_embeddings

    def logprobs(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Float32 [T - 1]."""
        return self.score([tokens])[0]

    @torch.no_grad()
    def score(self, texts: Sequence[Sequence[int] | np.ndarray]) -> list[np.ndarray]:
        """`logprobs` of several texts; those of like length share a pass, padded behind."""
        ids = [np.asarray(t, np.int64) for t in texts]
        found: list[np.ndarray] = [np.zeros(0, np.float32)] * len(ids)
        order = sorted((i for i in range(len(ids)) if len(ids[i]) > 1), key=lambda i: -len(ids[i]))
        while order:
            rows = max(1, _ROWS // len(ids[order[0]]))
            group, order = order[:rows], order[rows:]
            padded = np.zeros((len(group), len(ids[group[0]])), np.int64)
            for row, i in enumerate(group):
                padded[row, :len(ids[i])] = ids[i]
            values = self._read(torch.from_numpy(padded))
            for row, i in enumerate(group):
                found[i] = values[row, :len(ids[i]) - 1]
        return found

    @torch.no_grad()
    def continuations(self, requests: Sequence[tuple[Sequence[int], Sequence[int]]],
                      prefix: int = 0) -> list[tuple[float, bool]]:
        """As `Scorer` says; the prefix is read once a call, texts of like length share a pass."""
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        if not requests:
            return found
        weight = self.model.head_weight
        start = self.model.new_cache()
        if prefix:
            ids = torch.tensor([list(requests[0][0][:prefix])], device=weight.device)
            for at in range(0, prefix, _ROWS):
                self.model.hidden(ids[:, at:at + _ROWS], start)
        texts = [[*context[prefix:], *continuation[:-1]] for context, continuation in requests]
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        while order:
            rows = max(1, _ROWS // (prefix + len(texts[order[0]])))
            group, order = order[:rows], order[rows:]
            padded = torch.zeros(len(group), len(texts[group[0]]), dtype=torch.int64)
            for row, i in enumerate(group):
                padded[row, :len(texts[i])] = torch.tensor(texts[i])
            hidden = self.model.hidden(padded.to(weight.device), _repeated(start, len(group)) if prefix else None)
            for row, i in enumerate(group):
                wanted = torch.tensor(list(requests[i][1]), device=weight.device)
                last = hidden[row, len(texts[i]) - len(wanted):len(texts[i])]
                logits = (last @ weight.T.to(last.dtype)).float()
                chosen = logits.log_softmax(-1).gather(-1, wanted[:, None])
                found[i] = float(chosen.double().sum()), bool((logits.argmax(-1) == wanted).all())
        return found

    @torch.no_grad()
    def generate_until(self, prompts: Sequence[Sequence[int]], max_tokens: int, stop: Sequence[str] = (),
                       prefix: int = 0) -> list[str]:
        """As `Scorer` says, one prompt after the other; for long runs take the engine, which is made for it."""
        if self.tokenizer is None:
            raise ConfigError("tokenizer: none given, so there is no text to write; TorchScorer(model, tokenizer=...)")
        return [self._write(list(prompt), max_tokens, stop) for prompt in prompts]

    def _write(self, prompt: list[int], max_tokens: int, stop: Sequence[str]) -> str:
        assert self.tokenizer is not None
        weight, cache = self.model.head_weight, self.model.new_cache()
        ends = {*self.model.config.eos_token_ids, self.tokenizer.eos}
        written: list[int] = []
        new = prompt
        while len(written) < max_tokens:
            hidden = self.model.hidden(torch.tensor([new], device=weight.device), cache)[0, -1]
            token = int((hidden @ weight.T.to(hidden.dtype)).argmax())
            if token in ends:
                break
            written, new = [*written, token], [token]
            text = self.tokenizer.decode(written)
            if found := [at for at in (text.find(s) for s in stop) if at >= 0]:
                return text[:min(found)]
        return self.tokenizer.decode(written)

    @torch.no_grad()
    def rows(self, tokens: np.ndarray) -> Iterator[np.ndarray]:
        """Float32 logits of what follows each token, in blocks [n, vocab]: a path for `agreement.compare`."""
        weight, cache = self.model.head_weight, self.model.new_cache()
        ids = torch.from_numpy(np.asarray(tokens, np.int64))[None].to(weight.device)
        for at in range(0, ids.shape[1], _HEAD // 4):
            hidden = self.model.hidden(ids[:, at:at + _HEAD // 4], cache)[0]
            yield (hidden @ weight.T.to(hidden.dtype)).float().cpu().numpy()

    def _read(self, ids: torch.Tensor) -> np.ndarray:
        """[rows, T] -> log-probabilities [rows, T - 1]."""
        weight = self.model.head_weight
        ids = ids.to(weight.device)
        inputs, targets = ids[:, :-1], ids[:, 1:]
        cache = self.model.new_cache() if inputs.shape[1] > _ROWS else None
        parts = []
        for at in range(0, inputs.shape[1], _ROWS):
            hidden = self.model.hidden(inputs[:, at:at + _ROWS], cache)
            wanted = targets[:, at:at + _ROWS].reshape(-1)
            flat = hidden.reshape(-1, hidden.shape[-1])
            losses = [F.cross_entropy((flat[i:i + _HEAD] @ weight.T.to(flat.dtype)).float(), wanted[i:i + _HEAD],
                                      reduction="none") for i in range(0, len(flat), _HEAD)]
            parts.append(-torch.cat(losses).view(hidden.shape[:2]))
        return torch.cat(parts, 1).cpu().numpy()


def _repeated(cache: Cache, rows: int) -> Cache:
    """A copy of a cache of one row for several rows that go on from it."""
    copy = cache.copy()
    for layer in copy.layers:
        for name in layer.__slots__:
            value = getattr(layer, name)
            if isinstance(value, torch.Tensor):
                setattr(layer, name, value.expand(rows, *value.shape[1:]).contiguous())
    return copy


def open_scorer(folder: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> TorchScorer:
    """The model of a Hugging Face folder."""
    has_tokenizer = (Path(folder) / "tokenizer.json").is_file()
    return TorchScorer(HybridLM.from_pretrained(folder, dtype, device),
                       tokenizer=Tokenizer.from_file(folder) if has_tokenizer else None)
