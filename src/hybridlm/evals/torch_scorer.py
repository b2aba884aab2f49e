"""`TorchScorer`: a PyTorch `HybridLM` as a `Scorer`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from hybridlm.model import HybridLM

__all__ = ["TorchScorer"]

_ROWS = 4096  # tokens of one forward pass; a longer text goes on from the cache
_HEAD = 1024  # tokens whose logits exist at a time


class TorchScorer:
    """Scores on the device and in the dtype that the model is in."""

    def __init__(self, model: HybridLM, *, context: int | None = None) -> None:
        self.model = model.eval()
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


def open_scorer(folder: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> TorchScorer:
    """The model of a Hugging Face folder."""
    return TorchScorer(HybridLM.from_pretrained(folder, dtype, device))
