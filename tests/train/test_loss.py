"""The chunked loss against autograd on whole logits, in float64."""

from __future__ import annotations

import pytest
import torch

from hybridlm.ops import cross_entropy as room
from hybridlm.ops import linear_cross_entropy
from hybridlm.train.loss import token_losses

torch.set_num_threads(1)


def reference(hidden, weight, targets, z):
    logits = hidden @ weight.T
    total = torch.logsumexp(logits, -1)
    return (total - logits[torch.arange(len(targets)), targets] + z * total**2).sum()


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 30])
@pytest.mark.parametrize("z", [0.0, 1e-2])
@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_value_and_gradients(monkeypatch, tokens, z, scale):
    monkeypatch.setitem(room.LOGITS, "cpu", 8 * 11 + 5)
    torch.manual_seed(tokens)
    hidden, weight = torch.randn(tokens, 5) * scale, torch.randn(11, 5)
    targets = torch.randint(11, (tokens,))
    wanted = [t.double().requires_grad_() for t in (hidden, weight)]
    (reference(*wanted, targets, z) / 3).backward()
    given = [t.requires_grad_() for t in (hidden, weight)]
    value = linear_cross_entropy(*given, targets, z)
    (value / 3).backward()
    torch.testing.assert_close(value.double(), reference(*wanted, targets, z), rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(given, wanted, strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5 * scale)


def test_bfloat16_activations_give_float32_gradients_of_the_weight(monkeypatch):
    monkeypatch.setitem(room.LOGITS, "cpu", 500)
    torch.manual_seed(0)
    hidden = torch.randn(64, 16).bfloat16().requires_grad_()
    weight = torch.randn(50, 16, requires_grad=True)
    targets = torch.randint(50, (64,))
    linear_cross_entropy(hidden, weight, targets).backward()
    assert (hidden.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32)
    exact = weight.detach().double().requires_grad_()
    reference(hidden.detach().double(), exact, targets, 0.0).backward()
    assert (weight.grad - exact.grad).norm() / exact.grad.norm() < 2e-2


def test_token_losses_sum_to_the_loss(monkeypatch):
    monkeypatch.setitem(room.LOGITS, "cpu", 500)
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(21, 5), torch.randn(11, 5), torch.randint(11, (21,))
    wanted = linear_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(token_losses(hidden, weight, targets).sum(), wanted)
