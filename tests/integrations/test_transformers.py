"""transformers' own model on our operations against transformers' model on its own."""

from __future__ import annotations

import pytest
import torch
from tests.model.configs import hybrid_config, random_model

transformers = pytest.importorskip("transformers")
from hybridlm.integrations import transformers as hook  # noqa: E402

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def given_back():
    yield
    hook.disable()


@pytest.fixture
def model(tmp_path):
    random_model(hybrid_config(3), 3).save_pretrained(tmp_path)
    return transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)


def both(function):
    """What a function gives with transformers' operations, and with ours."""
    hook.disable()
    theirs = function()
    hook.enable()
    return theirs, function()


def test_logits_and_gradients_are_theirs(model):
    ids = torch.randint(0, model.config.vocab_size, (2, 70), generator=torch.Generator().manual_seed(0))

    def step():
        model.zero_grad()
        out = model(ids, labels=ids)
        out.loss.backward()
        return out.logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}

    (logits, gradients), (ours, our_gradients) = both(step)
    torch.testing.assert_close(ours, logits, rtol=1e-4, atol=2e-5 * max(1, float(logits.abs().max())))
    for name, gradient in gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


@torch.no_grad()
def test_generation_with_left_padding_is_theirs(model):
    model.eval()
    ids = torch.randint(1, model.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    theirs, ours = both(lambda: model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False,
                                               eos_token_id=None))
    assert torch.equal(theirs, ours)


@torch.no_grad()
def test_packed_documents_do_not_see_each_other(model):
    model.eval()
    hook.enable()
    bounds = torch.tensor([0, 20, 50], dtype=torch.int32)
    layer = next(x.linear_attn for x in model.model.layers if hasattr(x, "linear_attn"))
    x = torch.randn(1, 50, model.config.hidden_size)
    packed = layer(x, cu_seq_lens_q=bounds)
    apart = torch.cat([layer(x[:, a:b]) for a, b in ((0, 20), (20, 50))], 1)
    torch.testing.assert_close(packed, apart, rtol=1e-4, atol=1e-5)


def test_disable_gives_theirs_back(model):
    from transformers.models.olmo_hybrid import modeling_olmo_hybrid as theirs

    hook.enable()
    assert theirs.causal_conv1d_fn is hook.causal_conv1d_fn
    hook.disable()
    assert theirs.causal_conv1d_fn is not hook.causal_conv1d_fn


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_in_bfloat16_it_is_as_near_to_float32_as_theirs(tmp_path):
    from hybridlm.config import FULL, LINEAR, HybridConfig

    config = HybridConfig(vocab_size=500, hidden_size=128, intermediate_size=256, num_attention_heads=2,
                          layer_types=(LINEAR, LINEAR, FULL), pad_token_id=0)
    random_model(config, 0).save_pretrained(tmp_path)
    ids = torch.randint(1, 500, (2, 150), generator=torch.Generator().manual_seed(0))

    def step(device, dtype):
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).to(device)
        out = model(ids.to(device), labels=ids.to(device))
        out.loss.backward()
        gradient = torch.cat([p.grad.flatten().float().cpu() for p in model.parameters()])
        generated = model.generate(ids[:, :20].to(device), max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert generated.shape == (2, 28)
        return out.logits.detach().float().cpu(), gradient

    hook.disable()
    exact = step("cpu", torch.float32)
    theirs, ours = both(lambda: step("cuda", torch.bfloat16))
    for mine, other, want in zip(ours, theirs, exact, strict=True):
        assert (mine - want).norm() < 1.2 * (other - want).norm() + 1e-3 * want.norm()
