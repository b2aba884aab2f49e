"""`config.json` of Hugging Face's `olmo_hybrid` and `olmo3` models <-> `HybridConfig`.

Reading means what transformers' own classes would mean, defaults of absent keys included. The trap is rotary embedding:
in `olmo_hybrid`, {"rope_theta": null} is no rotation (NoPE), whereas no `rope_parameters` at all is rotation with theta
10,000. So what is written always says it. A file that asks for something this model cannot do is refused with the key
named; keys without meaning here are kept in `HybridConfig.extra` and written back.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from hybridlm.atomic import write_file
from hybridlm.config import FULL, LINEAR, SLIDING, HybridConfig, Rope, Yarn
from hybridlm.errors import ConfigError

__all__ = ["read_config", "read_generation_eos", "write_config"]

MAX_FILE_BYTES = 16 << 20

# What transformers assumes for keys that a file leaves out.
_HYBRID_DEFAULTS: dict[str, Any] = {
    "vocab_size": 100_352, "hidden_size": 3840, "intermediate_size": 11_008, "num_hidden_layers": 32,
    "num_attention_heads": 30, "max_position_embeddings": 65_536, "rms_norm_eps": 1e-6, "pad_token_id": 100_277,
    "eos_token_id": 100_257,
}
_OLMO3_DEFAULTS: dict[str, Any] = {
    "vocab_size": 50_304, "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "pad_token_id": 1,
    "eos_token_id": 50_279, "sliding_window": 4096,
}
# Keys that have one meaning only here; any other value is refused.
_FIXED = {"hidden_act": ("silu", "swish"), "attention_bias": (False, None), "mlp_bias": (False, None),
          "attention_dropout": (0, None), "linear_use_gate": (True, None), "partial_rotary_factor": (1, None)}
_FORMER_TYPES = {"attention": FULL, "mamba": LINEAR}
_OWN = {f.name for f in fields(HybridConfig) if f.init} - {"rope", "sliding_rope", "extra"}
_HANDLED = _OWN | set(_FIXED) | {"model_type", "architectures", "num_hidden_layers", "head_dim", "rope_parameters",
                                 "rope_scaling", "rope_theta", "original_max_position_embeddings"}


def read_config(path: str | Path) -> HybridConfig:
    """Read `config.json` (its folder, or the file itself). Raises `ConfigError` naming what is wrong."""
    file = Path(path)
    return from_hf(_read_object(file / "config.json" if file.is_dir() else file))


def read_generation_eos(folder: str | Path) -> tuple[int, ...]:
    """Ids that end a sequence according to `generation_config.json`, which often names more than `config.json`."""
    file = Path(folder) / "generation_config.json"
    if not file.is_file():
        return ()
    eos = _read_object(file).get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise ConfigError(f"eos_token_id: must be a token id, not {eos!r} (in {file})")
    return tuple(ids)


def _read_object(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{file}: too large for a {file.name}")
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror}); give a model's folder") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: not valid JSON ({error}); download it again") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{file}: expected a JSON object")
    return data


def from_hf(data: dict[str, Any]) -> HybridConfig:
    """The content of a `config.json` as a configuration."""
    kind = data.get("model_type")
    if kind not in ("olmo_hybrid", "olmo3"):
        raise ConfigError(f"model_type: {kind!r} is not supported; olmo_hybrid and olmo3 are")
    for name, allowed in _FIXED.items():
        if name in data and data[name] not in allowed:
            raise ConfigError(f"{name}: {data[name]!r} is not supported; only {allowed[0]!r} is")
    values = dict(_HYBRID_DEFAULTS if kind == "olmo_hybrid" else _OLMO3_DEFAULTS)
    values |= {name: value for name, value in data.items() if name in _OWN or name == "num_hidden_layers"}
    depth = values.pop("num_hidden_layers")
    if isinstance(depth, bool) or not isinstance(depth, int) or not 0 < depth <= 65_536:
        raise ConfigError(f"num_hidden_layers: must be a positive whole number, not {depth!r}")
    values["layer_types"] = _layer_types(kind, values.get("layer_types"), depth)
    for name in ("tie_word_embeddings", "linear_allow_neg_eigval"):
        if not isinstance(values.get(name, True), bool):
            raise ConfigError(f"{name}: must be true or false, not {values[name]!r}")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = values.get(name)
        if not all(type(i) is int for i in (ids if isinstance(ids, list) else [ids or 0])):
            raise ConfigError(f"{name}: must be a token id, not {ids!r}")
    heads = values.get("num_attention_heads")
    for name in ("linear_num_key_heads", "linear_num_value_heads"):
        if values.get(name) is None:
            values[name] = heads  # transformers' default, for value heads too
    try:
        if data.get("head_dim") is not None and data["head_dim"] * heads != values["hidden_size"]:
            raise ConfigError(f"head_dim: {data['head_dim']} is not hidden_size / num_attention_heads, the only width "
                              "supported")
        values |= _ropes(kind, data, values)
        values["extra"] = {name: value for name, value in data.items() if name not in _HANDLED}
        return HybridConfig(**values)
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ConfigError(f"config.json: a value of the wrong kind ({error})") from None


def _layer_types(kind: Any, given: Any, depth: int) -> tuple[str, ...]:
    if given is None:
        if kind == "olmo3":
            return tuple(SLIDING if (i + 1) % 4 else FULL for i in range(depth))
        return tuple(FULL if i % 4 == 3 or i == depth - 1 < 3 else LINEAR for i in range(depth))
    if not isinstance(given, list) or not all(isinstance(t, str) for t in given):
        raise ConfigError("layer_types: must be a list of names")
    if len(given) != depth:
        raise ConfigError(f"num_hidden_layers: {depth}, but layer_types names {len(given)} layers")
    return tuple(str(_FORMER_TYPES.get(t, t)) for t in given)


def _ropes(kind: Any, data: dict[str, Any], values: dict[str, Any]) -> dict[str, Rope | None]:
    """`rope` and `sliding_rope`, following transformers' `convert_rope_params_to_dict` of each class."""
    given, scaling = data.get("rope_parameters"), data.get("rope_scaling")
    for name, value in (("rope_parameters", given), ("rope_scaling", scaling)):
        if value is not None and not isinstance(value, dict):
            raise ConfigError(f"{name}: must be an object")
    kinds = set(values["layer_types"])
    nested: dict[str, Any]
    if kind == "olmo3":
        # Flat parameters are passed over; the former top-level theta reaches full attention only.
        nested = {name: dict((given or {}).get(name) or {}) for name in (FULL, SLIDING)}
        nested[FULL] |= scaling or {}
        nested[FULL].setdefault("rope_theta", data.get("rope_theta", 500_000.0))
        nested[SLIDING].setdefault("rope_theta", 500_000.0)
        for p in nested.values():  # read from the outer object alone
            p["truncate"] = (given or {}).get("truncate", True)
    else:
        given = scaling or given or {}
        nested = {name: given.get(name) for name in (FULL, SLIDING)} if kinds & set(given) else {FULL: given}
        theta = data.get("rope_theta", 10_000.0)
        nested = {name: None if p is None else {"rope_theta": theta, **p} for name, p in nested.items()}
        if nested[FULL] and nested[FULL].get("rope_type", "") is None and "rope_theta" not in given:
            nested[FULL] = None  # {"rope_type": null}: some copies of the released model spell NoPE so
        nested.setdefault(SLIDING, nested[FULL])
    original = data.get("original_max_position_embeddings")
    make = {name: _rope(nested[name], original or values["max_position_embeddings"]) for name in (FULL, SLIDING)}
    return {"rope": make[FULL], "sliding_rope": make[SLIDING] if SLIDING in kinds else None}


def _rope(p: dict[str, Any] | None, original: Any) -> Rope | None:
    if p is None or p.get("rope_theta") is None:
        return None
    kind = p.get("rope_type", p.get("type", "default"))
    if p.get("partial_rotary_factor") not in (None, 1):
        raise ConfigError("rope_parameters: partial_rotary_factor other than 1 is not supported")
    if kind == "default":
        return Rope(float(p["rope_theta"]))
    if kind != "yarn":
        raise ConfigError(f"rope_parameters: rope_type {kind!r} is not supported; 'default' and 'yarn' are")
    if p.get("mscale") and p.get("mscale_all_dim") and p.get("attention_factor") is None:
        raise ConfigError("rope_parameters: mscale is not supported; give attention_factor")
    original = p.get("original_max_position_embeddings") or original
    if p.get("factor") is None:
        raise ConfigError("rope_parameters: yarn needs a factor")
    attention = p.get("attention_factor")
    yarn = Yarn(float(p["factor"]), int(original), float(p.get("beta_fast") or 32.0), float(p.get("beta_slow") or 1.0),
                None if attention is None else float(attention), bool(p.get("truncate", True)))
    return Rope(float(p["rope_theta"]), yarn)


def write_config(config: HybridConfig, folder: str | Path) -> None:
    """Write `config.json` into a folder (made if need be), as transformers reads it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(to_hf(config), indent=2) + "\n"
    write_file(folder / "config.json", text.encode())


def to_hf(config: HybridConfig) -> dict[str, Any]:
    """The content of `config.json`. Models without a recurrent layer are `olmo3`, all others `olmo_hybrid`."""
    hybrid = LINEAR in config.layer_types
    data: dict[str, Any] = dict(config.extra)
    data["architectures"] = ["OlmoHybridForCausalLM" if hybrid else "Olmo3ForCausalLM"]
    data["model_type"] = "olmo_hybrid" if hybrid else "olmo3"
    data["num_hidden_layers"] = config.num_hidden_layers
    left_out = set() if hybrid or _has_own_linear(config) else {name for name in _OWN if name.startswith("linear_")}
    for name in sorted(_OWN - left_out):
        value = getattr(config, name)
        data[name] = list(value) if isinstance(value, tuple) else value
    if hybrid and config.sliding_window is None:
        del data["sliding_window"]
    data |= {"hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0}
    data["rope_parameters"] = _written_rope(config.rope)
    if not hybrid or SLIDING in config.layer_types:
        sliding = config.sliding_rope if SLIDING in config.layer_types else config.rope
        data["rope_parameters"] = {FULL: _written_rope(config.rope), SLIDING: _written_rope(sliding)}
        if config.rope and config.rope.yarn and not config.rope.yarn.truncate:
            data["rope_parameters"]["truncate"] = False  # where transformers looks for it
    return data


def _has_own_linear(config: HybridConfig) -> bool:
    """Whether anyone set a field of Gated DeltaNet, in a model that has no such layer."""
    plain = HybridConfig(config.vocab_size, config.hidden_size, config.intermediate_size, config.layer_types,
                         config.num_attention_heads, sliding_window=config.sliding_window)
    return any(getattr(plain, name) != getattr(config, name) for name in _OWN if name.startswith("linear_"))


def _written_rope(rope: Rope | None) -> dict[str, Any]:
    if rope is None:
        return {"rope_type": "default", "rope_theta": None}
    if rope.yarn is None:
        return {"rope_type": "default", "rope_theta": rope.theta}
    y = rope.yarn
    data = {"rope_type": "yarn", "rope_theta": rope.theta, "factor": y.factor, "beta_fast": y.beta_fast,
            "original_max_position_embeddings": y.original_max_position_embeddings, "beta_slow": y.beta_slow,
            "truncate": y.truncate}
    return data if y.attention_factor is None else {**data, "attention_factor": y.attention_factor}
