"""Random small models: every way in which a configuration can differ, with weights that make a difference show.

At the initial deviation of 0.02 a small model's logits are almost zero and every bound is met by anything. These
weights are large enough that gates saturate, keys line up, and logits differ by several units between tokens.
"""

import random

import torch

from hybridlm.config import FULL, LINEAR, SLIDING, HybridConfig, Rope, Yarn
from hybridlm.model import HybridLM


def random_rope(rng):
    kind = rng.choice(["none", "plain", "plain", "yarn"])
    if kind == "none":
        return None
    theta = rng.choice([100.0, 10_000.0, 500_000.0])
    if kind == "plain":
        return Rope(theta)
    return Rope(theta, Yarn(rng.choice([1.5, 4.0, 8.0]), rng.choice([32, 128, 4096]),
                            attention_factor=rng.choice([None, 1.2079441541679836])))


def heads_of(rng):
    """Attention heads and their width, together at least 16 wide."""
    heads = rng.randint(1, 5)
    return heads, 2 * rng.randint(max(2, -(-8 // heads)), 10)


def hybrid_config(seed, narrow=False):
    """Gated DeltaNet and full attention, as transformers' OlmoHybrid can express it.

    Keys are at least 5 wide unless `narrow`: scaling a key of width 1 to length 1 leaves little but its sign, a step
    that magnifies rounding a thousandfold wherever a key passes zero, in any implementation.
    """
    rng = random.Random(seed)
    heads, head_dim = heads_of(rng)
    layers = rng.randint(2, 6)
    pattern = [rng.choice([LINEAR, LINEAR, FULL]) for _ in range(layers)]
    if LINEAR not in pattern:
        pattern[0] = LINEAR
    if FULL not in pattern:
        pattern[-1] = FULL
    key_heads = rng.randint(1, 3)
    rope = random_rope(rng)
    return HybridConfig(
        vocab_size=rng.randint(30, 150), hidden_size=heads * head_dim, intermediate_size=rng.randint(5, 90),
        layer_types=tuple(pattern), num_attention_heads=heads,
        num_key_value_heads=rng.choice([h for h in range(1, heads + 1) if heads % h == 0]),
        linear_num_key_heads=key_heads, linear_num_value_heads=key_heads * rng.randint(1, 3),
        linear_key_head_dim=rng.randint(1, 4) if narrow else rng.randint(5, 25),
        linear_value_head_dim=rng.randint(1, 30),
        linear_conv_kernel_dim=rng.randint(2, 5), linear_allow_neg_eigval=rng.random() < 0.75, rope=rope,
        rms_norm_eps=rng.choice([1e-6, 1e-5]), tie_word_embeddings=rng.random() < 0.4,
        max_position_embeddings=4096, pad_token_id=0, eos_token_id=1)


def olmo3_config(seed):
    """Sliding and full attention, as transformers' Olmo3 can express it.

    Windows from 2 up: with a window of 1 transformers' cache keeps all keys instead of none (it slices from -0).
    """
    rng = random.Random(seed)
    heads, head_dim = heads_of(rng)
    layers = rng.randint(1, 5)
    theta = rng.choice([100.0, 10_000.0, 500_000.0])
    yarn = random_rope(rng)
    return HybridConfig(
        vocab_size=rng.randint(30, 150), hidden_size=heads * head_dim,
        intermediate_size=rng.randint(5, 90), layer_types=tuple(rng.choice([SLIDING, FULL]) for _ in range(layers)),
        num_attention_heads=heads,
        num_key_value_heads=rng.choice([h for h in range(1, heads + 1) if heads % h == 0]),
        rope=Rope(theta, yarn.yarn if yarn else None), sliding_rope=Rope(theta), sliding_window=rng.randint(2, 60),
        rms_norm_eps=rng.choice([1e-6, 1e-5]), tie_word_embeddings=rng.random() < 0.4,
        max_position_embeddings=4096, pad_token_id=0, eos_token_id=1)


@torch.no_grad()
def random_model(config, seed):
    """A float32 model with weights of every scale that a trained model might have."""
    model = HybridLM(config)
    generator = torch.Generator().manual_seed(seed)

    def normal(shape, std):
        return torch.randn(shape, generator=generator) * std

    for name, p in model.named_parameters():
        if name.endswith("norm.weight"):
            p.copy_(1 + normal(p.shape, 0.2))
        elif name.endswith("conv1d.weight"):
            p.copy_(normal(p.shape, 0.3))
            p[..., -1] += 0.5
        elif name.endswith("A_log"):
            p.copy_(torch.rand(p.shape, generator=generator) * 5 - 3)
        elif name.endswith("dt_bias"):
            p.copy_(normal(p.shape, 1) - 3)
        elif name.endswith("b_proj.weight"):  # write strengths from 0 to almost 2
            p.copy_(normal(p.shape, 2 * p.shape[1] ** -0.5))
        elif name.endswith(("embed_tokens.weight", "lm_head.weight")):
            p.copy_(normal(p.shape, 1.0 if name.startswith("model") and model.lm_head else 2 * p.shape[1] ** -0.5))
        else:  # what layers add is smaller than what they add to: rounding then grows slowly with depth
            p.copy_(normal(p.shape, (0.4 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0)
                           * p.shape[1] ** -0.5))
    return model


def float64(model):
    """The same model in float64: the yardstick."""
    twin = HybridLM(model.config).double()
    twin.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    return twin
