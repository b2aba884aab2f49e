"""`HybridConfig`: an architecture as data, its presets, and the transformer-only twin of each.

A model is a sequence of layers, each named by its sequence mixer:

    "linear_attention"   Gated DeltaNet, a recurrence; the block is PRE-norm
    "full_attention"     causal softmax attention; the block is POST-norm ("reordered" norm, as in Olmo 2 and 3)
    "sliding_attention"  the same over the last `sliding_window` tokens

Field names are those of Hugging Face's `OlmoHybridConfig` wherever it has one, so `config.json` maps one to one.
Reading and writing of `config.json` lives in `hybridlm.formats.hf_config`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridlm.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["PRESETS", "HybridConfig", "Rope", "Yarn"]

LINEAR, FULL, SLIDING = "linear_attention", "full_attention", "sliding_attention"
LAYER_TYPES = (LINEAR, FULL, SLIDING)


@dataclass(frozen=True, slots=True)
class Yarn:
    """YaRN context extension (arXiv 2309.00071), with the parameter names of Hugging Face's `rope_parameters`.

    `attention_factor` scales cos and sin; None means 0.1 ln(factor) + 1. `truncate` rounds the correction range to
    whole dimensions, as the original code does.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    @property
    def scale(self) -> float:
        """The factor on cos and sin."""
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding over the whole head: angles position * theta^(-2i/head_dim), halves rotated."""

    theta: float = 500_000.0
    yarn: Yarn | None = None

    @property
    def scale(self) -> float:
        """The factor on cos and sin (1 without YaRN)."""
        return self.yarn.scale if self.yarn else 1.0

    def inv_freq(self, head_dim: int) -> np.ndarray:
        """Angular frequencies, float32 [head_dim / 2], radians a token."""
        import numpy as np  # here, because `hybridlm --help` needs none of it

        exponent = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
        plain = 1.0 / self.theta**exponent
        if self.yarn is None:
            return plain.astype(np.float32)
        y = self.yarn

        def dimension(rotations: float) -> float:
            turns = y.original_max_position_embeddings / (rotations * 2 * math.pi)
            return head_dim * math.log(turns) / (2 * math.log(self.theta))

        low, high = dimension(y.beta_fast), dimension(y.beta_slow)
        if y.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        ramp = np.clip((np.arange(head_dim // 2) - low) / (high - low or 1e-3), 0, 1)
        return (plain / y.factor * ramp + plain * (1 - ramp)).astype(np.float32)


@dataclass(frozen=True)
class HybridConfig:
    """The shape of a hybrid language model. Immutable; vary it with `dataclasses.replace` or `.with_(...)`.

    Raises `ConfigError`, naming the field, when the shape cannot exist.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layer_types: tuple[str, ...]
    num_attention_heads: int
    num_key_value_heads: int | None = None  # None: as many as query heads
    linear_num_key_heads: int | None = None  # None: num_attention_heads
    linear_num_value_heads: int | None = None  # None: linear_num_key_heads
    linear_key_head_dim: int | None = None  # None: 0.75 * hidden_size / key heads
    linear_value_head_dim: int | None = None  # None: 2 * linear_key_head_dim
    linear_conv_kernel_dim: int = 4
    linear_allow_neg_eigval: bool = True
    linear_a_log_min: float = 0.0
    linear_a_log_max: float = 16.0
    linear_dt_min: float = 1e-3
    linear_dt_max: float = 0.1
    linear_dt_init_floor: float = 1e-4
    rope: Rope | None = None  # of full attention; None is NoPE
    sliding_rope: Rope | None = None  # of sliding attention; None is NoPE
    sliding_window: int | None = None
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 65_536
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False)  # unknown keys of a config.json, kept

    # The output norm inside Gated DeltaNet has its own epsilon, hard-coded in every implementation.
    gdn_norm_eps: float = field(default=1e-5, init=False)

    def __post_init__(self) -> None:
        fill = object.__setattr__
        fill(self, "layer_types", tuple(self.layer_types))
        if isinstance(self.eos_token_id, list):
            fill(self, "eos_token_id", tuple(self.eos_token_id))
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "linear_conv_kernel_dim",
                     "max_position_embeddings"):
            _positive(name, getattr(self, name))
        if self.num_key_value_heads is None:
            fill(self, "num_key_value_heads", self.num_attention_heads)
        if self.linear_num_key_heads is None:
            fill(self, "linear_num_key_heads", self.num_attention_heads)
        _positive("linear_num_key_heads", self.linear_num_key_heads)
        if self.linear_num_value_heads is None:
            fill(self, "linear_num_value_heads", self.linear_num_key_heads)
        if self.linear_key_head_dim is None:
            fill(self, "linear_key_head_dim", int(0.75 * self.hidden_size / self.key_heads))
        if self.linear_value_head_dim is None:
            fill(self, "linear_value_head_dim", 2 * self.key_dim)
        self._validate()

    def _validate(self) -> None:
        for name in ("num_key_value_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"):
            _positive(name, getattr(self, name))
        if not self.layer_types:
            raise ConfigError("layer_types: a model needs at least one layer")
        for i, kind in enumerate(self.layer_types):
            if kind not in LAYER_TYPES:
                raise ConfigError(f"layer_types: layer {i} is {kind!r}; known are {', '.join(LAYER_TYPES)}")
        if self.has_attention:
            if self.hidden_size % self.num_attention_heads:
                raise ConfigError(f"num_attention_heads: {self.num_attention_heads} heads do not divide "
                                  f"hidden_size {self.hidden_size}")
            if self.num_attention_heads % self.kv_heads:
                raise ConfigError(f"num_key_value_heads: {self.kv_heads} does not divide "
                                  f"num_attention_heads {self.num_attention_heads}")
            if (self.rope or self.sliding_rope) and self.head_dim % 2:
                raise ConfigError(f"num_attention_heads: heads are {self.head_dim} wide; "
                                  "rotary embeddings need an even width")
        if LINEAR in self.layer_types and self.value_heads % self.key_heads:
            raise ConfigError(f"linear_num_value_heads: {self.value_heads} is not a multiple of "
                              f"linear_num_key_heads {self.key_heads}")
        if SLIDING in self.layer_types:
            if self.sliding_window is None:
                raise ConfigError("sliding_window: needed, because layer_types holds sliding_attention")
            _positive("sliding_window", self.sliding_window)
        for name in ("rope", "sliding_rope"):
            rope = getattr(self, name)
            if rope is not None and not (math.isfinite(rope.theta) and rope.theta > 1):
                raise ConfigError(f"{name}: theta must be a finite number above 1, not {rope.theta}")
            if rope is not None and rope.yarn is not None and not rope.yarn.factor >= 1:
                raise ConfigError(f"{name}: YaRN's factor must be at least 1, not {rope.yarn.factor}")
        if not (math.isfinite(self.rms_norm_eps) and self.rms_norm_eps > 0):
            raise ConfigError(f"rms_norm_eps: must be a small positive number, not {self.rms_norm_eps}")
        if not self.linear_a_log_max > self.linear_a_log_min >= 0:
            raise ConfigError("linear_a_log_max: must be above linear_a_log_min, which must not be negative")
        if not self.linear_dt_max >= self.linear_dt_min > 0:
            raise ConfigError("linear_dt_max: must not be below linear_dt_min, which must be positive")

    # -- shape in the field's letters; never None after construction -----------------------------------------------

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layer_types)

    @property
    def has_attention(self) -> bool:
        return FULL in self.layer_types or SLIDING in self.layer_types

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        """Key/value heads of attention."""
        return self.num_key_value_heads  # type: ignore[return-value]

    @property
    def key_heads(self) -> int:
        """Query/key heads of Gated DeltaNet."""
        return self.linear_num_key_heads  # type: ignore[return-value]

    @property
    def value_heads(self) -> int:
        """Value heads of Gated DeltaNet; each key head serves value_heads / key_heads neighbours."""
        return self.linear_num_value_heads  # type: ignore[return-value]

    @property
    def key_dim(self) -> int:
        """Width of one Gated DeltaNet key head, K."""
        return self.linear_key_head_dim  # type: ignore[return-value]

    @property
    def value_dim(self) -> int:
        """Width of one Gated DeltaNet value head, V."""
        return self.linear_value_head_dim  # type: ignore[return-value]

    @property
    def conv_channels(self) -> int:
        """Channels of the short convolution: q, k and v side by side."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """All token ids that end a sequence."""
        eos = self.eos_token_id
        return () if eos is None else (eos,) if isinstance(eos, int) else eos

    def rope_of(self, layer: int) -> Rope | None:
        """Rotary embedding of one attention layer, or None."""
        return self.sliding_rope if self.layer_types[layer] == SLIDING else self.rope

    def window_of(self, layer: int) -> int | None:
        """Sliding window of one attention layer in tokens (the token itself counted), or None."""
        return self.sliding_window if self.layer_types[layer] == SLIDING else None

    # -- counting ------------------------------------------------------------------------------------------------

    def num_parameters(self, *, embedding: bool = True) -> int:
        """Parameters in all; with `embedding=False` less the input table and the output head."""
        d, ff = self.hidden_size, self.intermediate_size
        mlp = 3 * d * ff + 2 * d  # and the block's two norms
        keys, values = self.key_heads * self.key_dim, self.value_heads * self.value_dim
        gdn = (d * (2 * keys + 2 * values + 2 * self.value_heads) + values * d
               + self.conv_channels * self.linear_conv_kernel_dim + 2 * self.value_heads + self.value_dim)
        kv = self.kv_heads * self.head_dim
        attention = 2 * d * d + 2 * d * kv + d + kv
        layers = sum(mlp + (gdn if kind == LINEAR else attention) for kind in self.layer_types)
        tables = self.vocab_size * d * (1 if self.tie_word_embeddings else 2)
        return layers + d + (tables if embedding else 0)

    # -- variation -----------------------------------------------------------------------------------------------

    def with_(self, **changes: Any) -> HybridConfig:
        """A copy with fields replaced; an unknown field raises `ConfigError`."""
        known = {f.name for f in fields(self) if f.init}
        for name in changes:
            if name not in known:
                raise ConfigError(f"{name}: not a field of HybridConfig; fields are {', '.join(sorted(known))}")
        return replace(self, **changes)

    def twin(self) -> HybridConfig:
        """The transformer-only sibling: same width, depth, heads and vocabulary, all layers full attention.

        A Gated DeltaNet mixer holds about 6 d^2 weights where attention holds 4 d^2; the twin's MLP is widened until
        the non-embedding parameters agree within 1%. Its attention has rotary embeddings (theta 500,000 where this
        config has none), because a transformer without any would be a handicapped opponent.
        """
        rope = self.rope or self.sliding_rope or Rope()
        base = self.with_(layer_types=(FULL,) * self.num_hidden_layers, rope=rope, sliding_rope=None,
                          sliding_window=None)
        target = self.num_parameters(embedding=False)
        per_unit = 3 * self.hidden_size * self.num_hidden_layers
        exact = self.intermediate_size + (target - base.num_parameters(embedding=False)) / per_unit
        for step in (256, 128, 64, 32, 16, 8, 4, 2, 1):  # the roundest width that stays well inside 1%
            width = max(step, round(exact / step) * step)
            twin = base.with_(intermediate_size=width)
            if abs(twin.num_parameters(embedding=False) - target) <= 0.004 * target:
                return twin
        raise ConfigError("intermediate_size: no MLP width matches this model's parameters with attention layers alone")

    # -- in and out ----------------------------------------------------------------------------------------------

    @classmethod
    def preset(cls, name: str) -> HybridConfig:
        """One of `PRESETS` by name; a trailing "-twin" gives the transformer-only sibling."""
        base = name.removesuffix("-twin")
        if base not in PRESETS:
            raise ConfigError(f"preset: {name!r} is unknown; known are {', '.join(PRESETS)} (and each with -twin)")
        return PRESETS[base].twin() if name.endswith("-twin") else PRESETS[base]

    @classmethod
    def from_pretrained(cls, path: str | Path) -> HybridConfig:
        """Read `config.json` of a folder (or the file itself) in Hugging Face's olmo_hybrid or olmo3 form."""
        from hybridlm.formats.hf_config import read_config

        return read_config(path)

    def save_pretrained(self, path: str | Path) -> None:
        """Write `config.json` into a folder in the form that transformers reads."""
        from hybridlm.formats.hf_config import write_config

        write_config(self, path)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, the inverse of `from_dict`; what a GGUF file carries whole."""
        data = asdict(self)
        del data["gdn_norm_eps"]
        data["extra"] = dict(self.extra)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> HybridConfig:
        """Rebuild from `to_dict`'s output, lists for tuples allowed (JSON)."""
        known = {f.name for f in fields(cls) if f.init}
        unknown = sorted(set(data) - known)
        if unknown:
            raise ConfigError(f"{unknown[0]}: not a field of HybridConfig")
        missing = [n for n in ("vocab_size", "hidden_size", "intermediate_size", "layer_types", "num_attention_heads")
                   if n not in data]
        if missing:
            raise ConfigError(f"{missing[0]}: missing")
        values = dict(data)
        try:
            for name in ("rope", "sliding_rope"):
                if isinstance(values.get(name), Mapping):
                    rope = dict(values[name])
                    if isinstance(rope.get("yarn"), Mapping):
                        rope["yarn"] = Yarn(**rope["yarn"])
                    values[name] = Rope(**rope)
            return cls(**values)
        except TypeError as error:
            raise ConfigError(f"config: {error}") from None


def _positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ConfigError(f"{name}: must be a positive whole number, not {value!r}")


def _pattern(layers: int, *, every: int = 4, mixer: str = LINEAR) -> tuple[str, ...]:
    """`every - 1` layers of `mixer`, then one of full attention, repeated."""
    return tuple(FULL if i % every == every - 1 else mixer for i in range(layers))


_DOLMA2: dict[str, Any] = {"vocab_size": 100_352, "pad_token_id": 100_277, "eos_token_id": 100_257}


def _ladder(hidden: int, ff: int, layers: int, heads: int) -> HybridConfig:
    """A rung with the 7B's ratios: K = 3/4 and V = 3/2 of the hidden size over all heads, MLP about 2.87 times it."""
    return HybridConfig(**_DOLMA2, hidden_size=hidden, intermediate_size=ff, layer_types=_pattern(layers),
                        num_attention_heads=heads, rope=Rope(500_000.0), max_position_embeddings=8192)


PRESETS: dict[str, HybridConfig] = {
    # For a first run on a laptop's CPU; the vocabulary is set by the tokenizer that goes with it.
    "tiny": HybridConfig(vocab_size=4096, hidden_size=128, intermediate_size=384, layer_types=_pattern(4),
                         num_attention_heads=2, rope=Rope(10_000.0), tie_word_embeddings=True,
                         max_position_embeddings=2048),
    "60m": _ladder(384, 1024, 8, 6),
    "100m": _ladder(512, 1536, 12, 8),
    "190m": _ladder(768, 2304, 12, 12),
    "370m": _ladder(1024, 2816, 16, 16),
    "760m": _ladder(1536, 4352, 16, 12),
    "1b": _ladder(2048, 5888, 16, 16),
    # Olmo Hybrid 7B as released: no positional encoding (DroPE).
    "7b": HybridConfig(**_DOLMA2, hidden_size=3840, intermediate_size=11_008, layer_types=_pattern(32),
                       num_attention_heads=30),
    # Its transformer sibling, Olmo 3 7B: three sliding-window layers to one of full attention, which has YaRN.
    "olmo3-7b": HybridConfig(**_DOLMA2, hidden_size=4096, intermediate_size=11_008,
                             layer_types=_pattern(32, mixer=SLIDING), num_attention_heads=32,
                             rope=Rope(500_000.0, Yarn(8.0, 8192, attention_factor=1.2079441541679836)),
                             sliding_rope=Rope(500_000.0), sliding_window=4096),
}
