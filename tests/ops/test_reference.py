"""The smaller operations against independent formulas."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hybridlm.config import Rope, Yarn
from hybridlm.ops import (
    apply_rope,
    documents_of,
    fused_attention,
    gated_rms_norm,
    positions_of,
    rms_norm,
    rope_tables,
    short_convolution,
)
from hybridlm.ops.reference import attention

torch.set_num_threads(1)


def normal(seed, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# -- norms -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_norms(scale):
    x, gate, weight = normal(0, 3, 7, 13) * scale, normal(1, 3, 7, 13), normal(2, 13)
    wide = x.double().numpy()
    want = weight.double().numpy() * wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(rms_norm(x, weight, 1e-5), want, rtol=1e-5, atol=1e-7)
    z = gate.double().numpy()
    np.testing.assert_allclose(gated_rms_norm(x, gate, weight, 1e-5), want * z / (1 + np.exp(-z)), rtol=1e-5, atol=1e-7)


def test_norms_round_once():
    """In bfloat16 the result is the float32 result rounded, the weight included."""
    x, gate, weight = (normal(s, 4, 31, dtype=torch.bfloat16) for s in range(3))
    wide = [t.float() for t in (x, gate)]
    assert torch.equal(rms_norm(x, weight.float()[0], 1e-6), rms_norm(wide[0], weight.float()[0], 1e-6).bfloat16())
    assert torch.equal(gated_rms_norm(x, gate, weight[0], 1e-5),
                       gated_rms_norm(*wide, weight[0].float(), 1e-5).bfloat16())


# -- documents -------------------------------------------------------------------------------------------------------

def test_documents_and_positions():
    documents = documents_of(torch.tensor([0, 2, 2, 3, 7]), 7)
    assert positions_of(documents).tolist() == [[0, 1, 0, 0, 1, 2, 3]]
    assert positions_of(torch.tensor([[5, 5, 5], [4, 9, 9]])).tolist() == [[0, 1, 2], [0, 0, 1]]


# -- convolution -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("time", [1, 2, 3, 4, 50])
@pytest.mark.parametrize("width", [1, 2, 4, 5])
def test_convolution(time, width):
    x, weight = normal(0, 2, time, 6, dtype=torch.float64), normal(1, 6, width, dtype=torch.float64)
    padded = F.pad(x.transpose(1, 2), (width - 1, 0))
    want = F.silu(F.conv1d(padded, weight[:, None], groups=6)).transpose(1, 2)
    y, state = short_convolution(x, weight)
    torch.testing.assert_close(y, want)
    first, middle = short_convolution(x[:, :time // 2], weight)
    second, end = short_convolution(x[:, time // 2:], weight, middle)
    torch.testing.assert_close(torch.cat([first, second], 1), want)
    torch.testing.assert_close(end, state)
    documents = (torch.arange(time) >= time // 2).long()[None].expand(2, -1)
    y, _ = short_convolution(x, weight, documents=documents)
    torch.testing.assert_close(y[:, time // 2:], short_convolution(x[:, time // 2:], weight)[0])
    torch.testing.assert_close(y[:, :time // 2], first)


# -- attention -------------------------------------------------------------------------------------------------------

def by_hand(q, k, v, window, allowed=lambda t, s: True):
    """Query by query, in numpy float64."""
    q, k, v = (x.double().numpy() for x in (q, k, v))
    batch, time, heads, width = q.shape
    out = np.zeros_like(q)
    offset, group = k.shape[1] - time, heads // k.shape[2]
    for b in range(batch):
        for t in range(time):
            seen = [s for s in range(offset + t + 1) if (window is None or offset + t - s < window) and allowed(t, s)]
            for h in range(heads):
                scores = k[b, seen, h // group] @ q[b, t, h] / np.sqrt(width)
                weights = np.exp(scores - scores.max())
                out[b, t, h] = weights / weights.sum() @ v[b, seen, h // group]
    return out


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (9, 9), (1, 9), (4, 9)])
def test_attention(queries, keys, window):
    q, k, v = normal(0, 2, queries, 6, 4) * 3, normal(1, 2, keys, 2, 4), normal(2, 2, keys, 2, 4)
    want = by_hand(q, k, v, window)
    np.testing.assert_allclose(attention(*(x.double() for x in (q, k, v)), window=window), want, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(fused_attention(q, k, v, window=window), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [None, 3])
def test_attention_of_packed_documents(window):
    q, k, v = (normal(s, 1, 12, 2, 4) for s in range(3))
    bounds = torch.tensor([0, 1, 6, 12])
    ids = documents_of(bounds, 12)
    want = by_hand(q, k, v, window, lambda t, s: ids[0, t] == ids[0, s])
    np.testing.assert_allclose(attention(q, k, v, window=window, cu_seqlens=bounds), want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(fused_attention(q, k, v, window=window, documents=ids), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rope", [Rope(10_000.0), Rope(500_000.0, Yarn(8.0, 128))], ids=["plain", "yarn"])
def test_rope_is_a_rotation_in_the_complex_plane(rope):
    x, positions = normal(0, 2, 11, 3, 8), torch.arange(5, 16)[None]
    inv_freq = torch.from_numpy(rope.inv_freq(8))
    y = apply_rope(x, *rope_tables(inv_freq, positions, rope.scale)).double().numpy()
    z = x[..., :4].double().numpy() + 1j * x[..., 4:].double().numpy()
    z = z * np.exp(1j * positions.numpy()[0, :, None, None] * inv_freq.double().numpy()) * rope.scale
    np.testing.assert_allclose(y, np.concatenate([z.real, z.imag], -1), rtol=1e-4, atol=1e-5)
