"""What a run starts from: fresh weights, a model folder or the checkpoint of another run, maybe with other positions.

The stages of a long training hand over here: midtraining starts from pretraining's checkpoint, long context from the
soup, without its rotary embeddings (DroPE) or with them stretched (YaRN).
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from hybridlm.config import HybridConfig, Yarn
from hybridlm.errors import ConfigError, DataError
from hybridlm.model import HybridLM
from hybridlm.text import Tokenizer
from hybridlm.train.checkpoint import read_weights
from hybridlm.train.recipe import Recipe

__all__ = ["config_of", "is_run", "run_of", "start_shape", "starting_model", "tokenizer_of", "weights_of",
           "whole_model"]


def is_run(path: str | Path) -> bool:
    """Whether a path is a run's folder or one of its checkpoints, not a model folder."""
    path = Path(path)
    return (path / "state.json").is_file() or (path / "checkpoints").is_dir()


def run_of(path: str | Path) -> Path:
    """The run that a checkpoint lies in; anything else itself."""
    path = Path(path)
    return path.resolve().parent.parent if (path / "state.json").is_file() else path


def tokenizer_of(path: str | Path) -> Path | None:
    """The folder of the tokenizer that belongs to a model folder, a run or a checkpoint."""
    places = (Path(path), run_of(path) / "tokenizer")
    return next((p for p in places if (p / "tokenizer.json").is_file()), None)


def weights_of(path: str | Path) -> dict[str, Tensor]:
    """The weights of a model folder, a run or a checkpoint, whole, float32, on the CPU."""
    return read_weights(path) if is_run(path) else HybridLM.from_pretrained(path, dtype=torch.float32).state_dict()


def config_of(path: str | Path) -> tuple[HybridConfig, int]:
    """(architecture, tokens of the sequences it was trained on) of a model folder, a run or a checkpoint."""
    path = Path(path)
    if not is_run(path):
        model = HybridConfig.from_pretrained(path)
        return model, model.max_position_embeddings
    file = path / "state.json" if (path / "state.json").is_file() else path / "recipe.json"
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
        recipe = held["recipe"] if file.name == "state.json" else held
        return HybridConfig.from_dict(recipe["model"]), int(recipe["sequence"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: does not say what model it is of ({error}); give another init=") from None


def start_shape(recipe: Recipe, tokenizer: Tokenizer) -> HybridConfig:
    """The architecture to train: the recipe's with a table of the tokenizer's size, rounded up to 128 rows, or that of
    `init`; with the positions that `rope` asks for."""
    rows = -(-tokenizer.vocab_size // 128) * 128
    model, trained = config_of(recipe.init) if recipe.init else (recipe.model.with_(vocab_size=rows), recipe.sequence)
    if model.vocab_size < tokenizer.vocab_size:
        raise ConfigError(f"init: {recipe.init} has a table of {model.vocab_size} tokens, the tokenizer "
                          f"{tokenizer.vocab_size}; give tokenizer={recipe.init}")
    model = model.with_(eos_token_id=tokenizer.eos, pad_token_id=tokenizer.pad)
    if recipe.rope == "drop":
        model = model.with_(rope=None, sliding_rope=None)
    elif recipe.rope:
        if model.rope is None:
            raise ConfigError(f"rope: {recipe.rope} stretches rotary embeddings, and the model has none")
        yarn = Yarn(recipe.yarn_factor, trained)
        model = model.with_(rope=replace(model.rope, yarn=yarn))
    return model.with_(max_position_embeddings=max(model.max_position_embeddings, recipe.sequence))


def starting_model(recipe: Recipe) -> HybridLM:
    """The model of `recipe.model`'s shape with the weights that a run starts from, float32."""
    torch.manual_seed(recipe.seed)
    if not recipe.init:
        model = HybridLM(recipe.model, init=False)
        model.init_weights(recipe.seed)
        return model
    return whole_model(recipe.model, weights_of(recipe.init))


def whole_model(config: HybridConfig, weights: dict[str, Tensor]) -> HybridLM:
    """A model that holds exactly these tensors, on the CPU."""
    with torch.device("meta"):
        model = HybridLM(config, init=False)
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise DataError(f"the weights are of another model: {str(error).splitlines()[-1].strip()}") from None
    model._place_frequencies()
    return model
