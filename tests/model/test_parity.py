"""The model against transformers' own implementations, on random configurations, in float32.

The bound on logits is 2e-5 x max(1, max |logit|). Both sides round differently, and a deep narrow model can magnify
rounding, so each is also compared with the same model in float64 and a failure says whose error it is.
"""

import random

import pytest
import torch
from tests.model.configs import float64, hybrid_config, olmo3_config, random_model

from hybridlm.model import HybridLM

transformers = pytest.importorskip("transformers")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)

LENGTHS = (1, 2, 63, 64, 65, 128, 300)


def length(seed):
    rng = random.Random(seed)
    return rng.choice([rng.choice(LENGTHS), rng.randint(1, 300)])


def tokens(config, seed, time, batch=2):
    return torch.randint(0, config.vocab_size, (batch, time), generator=torch.Generator().manual_seed(seed))


def theirs_from(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def assert_close(ours, theirs, exact, what):
    scale = max(1.0, float(exact.abs().max()))
    apart, our_error, their_error = (float((a - b).abs().max()) / scale
                                     for a, b in ((ours, theirs), (ours, exact), (theirs, exact)))
    assert apart < 2e-5, f"{what}: {apart:.1e} apart; from float64 ours is {our_error:.1e}, theirs {their_error:.1e}"


def assert_same_weights(model, other):
    for (name, a), (other_name, b) in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
        assert name == other_name and torch.equal(a, b), name


@torch.no_grad()
def check(config, seed, folder):
    model = random_model(config, seed)
    exact = float64(model)
    model.save_pretrained(folder / "ours")
    theirs = theirs_from(folder / "ours")

    # Both namings that transformers writes come back bit for bit.
    theirs.save_pretrained(folder / "default")
    theirs.save_pretrained(folder / "original", save_original_format=False)
    for name in ("ours", "default", "original"):
        assert_same_weights(model, HybridLM.from_pretrained(folder / name))

    ids = tokens(config, seed, length(seed))
    whole, want = model(ids), exact(ids)
    assert_close(whole, theirs(ids).logits, want, f"seed {seed}, {ids.shape[1]} tokens at once")

    # A prompt, then the rest a token or a few at a time, each side with its own cache.
    prompt, cache, their_cache = tokens(config, seed + 1, 1 + seed % 20), model.new_cache(), None
    rest = tokens(config, seed + 2, 12)
    want = exact(torch.cat([prompt, rest], 1))
    done = 0
    for part in (prompt, *rest.split([1, 1, 3, 1, 6], 1)):
        ours = model(part, cache=cache)
        output = theirs(part, past_key_values=their_cache, use_cache=True)
        their_cache = output.past_key_values
        assert_close(ours, output.logits, want[:, done:done + part.shape[1]], f"seed {seed}, cached from {done}")
        done += part.shape[1]
    assert cache.position == done

    generated = theirs.generate(prompt[:1], attention_mask=torch.ones_like(prompt[:1]), max_new_tokens=20,
                                do_sample=False, eos_token_id=None)
    assert torch.equal(generated, greedy(model, prompt[:1], 20)), f"seed {seed}: greedy decoding differs"


def greedy(model, ids, count):
    cache, new = model.new_cache(), ids
    for _ in range(count):
        new = model(new, cache=cache)[:, -1:].argmax(-1)
        ids = torch.cat([ids, new], 1)
    return ids


@pytest.mark.parametrize("seed", range(6))
def test_olmo_hybrid(seed, tmp_path):
    check(hybrid_config(seed), seed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6, 66))
def test_olmo_hybrid_many(seed, tmp_path):
    check(hybrid_config(seed), seed, tmp_path)


@pytest.mark.parametrize("seed", range(2))
def test_olmo3(seed, tmp_path):
    check(olmo3_config(seed), seed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 22))
def test_olmo3_many(seed, tmp_path):
    check(olmo3_config(seed), seed, tmp_path)


@pytest.mark.slow
@torch.no_grad()
def test_where_rounding_is_magnified_ours_is_no_further_from_float64(tmp_path):
    """Keys of width 1 to 4: both sides are off by more than the bound; over 40 such models ours is off by less."""
    ours, theirs = [], []
    for seed in range(40):
        config = hybrid_config(seed, narrow=True)
        model = random_model(config, seed)
        model.save_pretrained(tmp_path / str(seed))
        ids = tokens(config, seed, 200)
        want = float64(model)(ids)
        ours.append((model(ids) - want).abs().max().log())
        theirs.append((theirs_from(tmp_path / str(seed))(ids).logits - want).abs().max().log())
    assert torch.stack(ours).mean() < torch.stack(theirs).mean()
