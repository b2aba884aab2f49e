"""AdamW beside PyTorch's, Muon beside its definition, what is decayed, and a step that is not taken."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.train.helpers import micro

from hybridlm.model import HybridLM
from hybridlm.train.optimizer import HybridOptimizer, orthogonal, undecayed
from hybridlm.train.recipes import find

torch.set_num_threads(1)


def made(tmp_path, **settings):
    recipe = replace(find(micro(tmp_path)), **settings)
    model = HybridLM(recipe.model)
    return recipe, model, HybridOptimizer(model, recipe)


def give_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator) * 0.1


def test_adamw_is_pytorchs(tmp_path):
    recipe, model, mine = made(tmp_path, weight_decay=0.1)
    other = HybridLM(recipe.model)
    named = list(other.named_parameters())
    theirs = torch.optim.AdamW([
        {"params": [p for n, p in named if not undecayed(n, p)], "weight_decay": 0.1},
        {"params": [p for n, p in named if undecayed(n, p)], "weight_decay": 0.0}],
        lr=recipe.lr, betas=(recipe.beta1, recipe.beta2), eps=recipe.eps)
    for step in range(5):
        give_gradients(model, step)
        give_gradients(other, step)
        mine.step()
        theirs.step()
    for (name, p), (_, q) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("shape", [(16, 16), (8, 40), (40, 8), (1, 7)])
def test_orthogonal_has_singular_values_near_one(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    made = orthogonal(matrix)
    values = torch.linalg.svdvals(made)
    assert made.shape == shape
    assert values.min() > 0.3
    assert values.max() < 1.3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    assert (made * (u @ v)).sum() / made.norm() / (u @ v).norm() > 0.95


def test_muon_takes_hidden_matrices_and_nothing_else(tmp_path):
    _, model, optimizer = made(tmp_path, optimizer="muon")
    by = {id(p): g["muon"] for g in optimizer.param_groups for p in g["params"]}
    for name, p in model.named_parameters():
        hidden = p.ndim == 2 and "conv1d" not in name and "embed_tokens" not in name
        assert by[id(p)] == hidden, name
    assert any(by.values())


def test_muon_against_its_definition(tmp_path):
    recipe, model, optimizer = made(tmp_path, optimizer="muon", weight_decay=0.1)
    name, p = next((n, p) for n, p in model.named_parameters() if n.endswith("up_proj.weight"))
    expected, momentum = p.detach().double(), torch.zeros(p.shape, dtype=torch.float64)
    for step in range(3):
        give_gradients(model, step)
        gradient = p.grad.double()
        momentum = recipe.momentum * momentum + gradient
        update = orthogonal((gradient + recipe.momentum * momentum).float()).double()
        expected = expected * (1 - recipe.lr * 0.1) - recipe.lr * 0.2 * max(p.shape) ** 0.5 * update
        optimizer.step()
    torch.testing.assert_close(p.detach().double(), expected, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_skipped_step_leaves_everything_as_it_was(tmp_path, kind):
    _, model, optimizer = made(tmp_path, optimizer=kind)
    give_gradients(model, 0)
    optimizer.step(torch.zeros(()))
    before = [p.clone() for p in model.parameters()]
    kept = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    optimizer.step(torch.ones(()))
    for p, was, state in zip(model.parameters(), before, kept, strict=True):
        assert torch.equal(p, was)
        for key, value in state.items():
            assert torch.equal(optimizer.state[p][key], value), key


def test_what_is_decayed(tmp_path):
    _, model, optimizer = made(tmp_path)
    _, other, all_of_it = made(tmp_path, decay_all=True)
    spared = {n for n, p in model.named_parameters() for g in optimizer.param_groups
              if any(p is q for q in g["params"]) and not g["weight_decay"]}
    assert any(n.endswith("A_log") for n in spared)
    assert any(n.endswith("dt_bias") for n in spared)
    assert any("conv1d" in n for n in spared)
    assert any("norm" in n for n in spared)
    assert "model.embed_tokens.weight" in spared
    ai2 = {n for n, p in other.named_parameters() for g in all_of_it.param_groups
           if any(p is q for q in g["params"]) and not g["weight_decay"]}
    assert ai2 == {"model.embed_tokens.weight"}
