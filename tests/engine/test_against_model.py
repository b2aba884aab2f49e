"""The engine on a float32 file against the PyTorch model it was converted from, on random configurations."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tests.engine.helpers import random_config  # noqa: E402

from hybridlm.engine import Engine  # noqa: E402
from hybridlm.formats.convert import convert  # noqa: E402
from hybridlm.model import HybridLM  # noqa: E402


def random_model(config, seed):
    """Weights of a size that makes every part matter, unlike those of a fresh model."""
    generator = torch.Generator().manual_seed(seed)
    model = HybridLM(config)

    def normal(like):
        return torch.randn(like.shape, generator=generator)

    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("A_log"):
                p.copy_(torch.rand(p.shape, generator=generator) * 4 - 3)
            elif "norm" in name:
                p.copy_(1 + 0.2 * normal(p))
            elif "conv1d" in name:
                p.copy_(0.5 * normal(p))
            else:
                p.copy_(normal(p) / (p.shape[-1] ** 0.5 if p.dim() > 1 else 1))
    return model.eval()


def check(tmp_path, seed):
    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    config = random_config(rng)
    model = random_model(config, seed)
    model.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "model.gguf", "f32")
    tokens = rng.integers(0, config.vocab_size, int(rng.choice([1, 5, 64, 130, 300]))).tolist()
    with torch.no_grad():
        want = model(torch.tensor([tokens]))[0].numpy()
    with Engine.open(tmp_path / "model.gguf", kv_type="f32") as engine:
        assert engine.config == config
        got = engine.logits(tokens)
        session = engine.session()
        parts = np.stack([session.prefill(tokens[i:i + 97]) for i in range(0, len(tokens), 97)])
    bound = 1e-4 * max(1, np.abs(want).max())
    assert np.abs(got - want).max() < bound
    assert np.abs(parts - want[[*range(96, len(tokens) - 1, 97), len(tokens) - 1]]).max() < bound
    return float(np.abs(got - want).max())


@pytest.mark.parametrize("seed", range(12))
def test_engine_equals_the_model(tmp_path, seed):
    check(tmp_path, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1000, 1200))
def test_engine_equals_the_model_on_many_configurations(tmp_path, seed):
    check(tmp_path, seed)
