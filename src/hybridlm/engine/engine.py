"""`Engine`: an open model. Logits, scores, text, and sessions over one set of weights.

    engine = Engine.open("model.gguf")
    for piece in engine.generate("The steam engine", max_tokens=50):
        print(piece.text, end="", flush=True)

This file is the surface: opening, checking what comes in, and the names that others build on. `passes.py` does the
reading, `generate.py` the writing. An engine may be used from several threads; they take turns pass by pass.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from hybridlm.config import HybridConfig
from hybridlm.engine.chat import Said, chat_prompt
from hybridlm.engine.generate import Generation
from hybridlm.engine.layout import Layout
from hybridlm.engine.passes import SLAB, Part, Passes
from hybridlm.engine.prefix_cache import PrefixCache
from hybridlm.engine.sampler import Sampler
from hybridlm.engine.session import Session
from hybridlm.engine.state import State
from hybridlm.engine.walk import Ops
from hybridlm.engine.weights import Weights, bind, read_each_step
from hybridlm.errors import FormatError, HybridLMError

__all__ = ["CHECKPOINT_EVERY", "Engine"]

CHECKPOINT_EVERY = 512


class Engine:
    """Open one with `Engine.open` or `Engine.random`."""

    def __init__(self, weights: Weights, ops: Ops, layout: Layout, *, name: str = "model", context: int | None = None,
                 device: str = "cpu", model_bytes: int = 0, file: Any = None, cache_bytes: int | None = None,
                 checkpoint_every: int = CHECKPOINT_EVERY) -> None:
        """For engines of other devices and for tests: weights as the device's loader made them, and its operations.

        Args:
            context: the most tokens a sequence may have; None is what the model was made for.
            file: an open `GGUFFile` that has the tokenizer and the chat template.
            cache_bytes: budget of the prefix cache; None is a tenth of the machine's memory, 0 turns it off.
            checkpoint_every: tokens between the checkpoints that `generate` keeps while it reads a prompt.
        """
        self.config: HybridConfig = weights.config
        self.layout = layout
        self.name = name
        self.device = device
        self.context = self.config.max_position_embeddings if context is None else _positive("context", context)
        self.model_bytes = model_bytes
        self.checkpoint_every = _positive("checkpoint_every", checkpoint_every)
        self.cache = PrefixCache(_memory() // 10 if cache_bytes is None else cache_bytes)
        self.said = Said()
        self._weights, self._ops, self._file = weights, ops, file
        self._passes = Passes(weights, ops, self.context)

    @classmethod
    def open(cls, path: str | Path, device: str = "cpu", threads: int | None = None, kv_type: str | None = None,
             context: int | None = None, *, cache_bytes: int | None = None,
             checkpoint_every: int | None = None, exact: bool = False, batch_invariant: bool = False,
             plain: bool = False) -> Engine:
        """Open a GGUF file that `hybridlm convert` or `hybridlm quantize` wrote.

        Args:
            device: "cpu", or "cuda" (or "cuda:1"), which takes Hugging Face folders too and turns weights to bfloat16.
            threads: that work on a pass; None leaves the native core's choice, all cores. One setting per process.
            kv_type: how attention keeps keys and values: "f32", "f16" (what None is on a processor), "q8_0" (half of
                f16), or on a GPU "bf16" (what None is there).
            context, cache_bytes, checkpoint_every: as for `Engine`; on a GPU every 4096 tokens unless told.
            exact: keep activations in float32 where quantised weights meet 8-bit ones otherwise; on a GPU keep
                everything in float32. Slow, for measuring.
            batch_invariant: on a GPU, a text's logits are the same in every bit whatever else is read beside it.
            plain: on a GPU, PyTorch's own operations one by one instead of kernels and recorded steps; for measuring.

        Raises `FormatError` for a file that is no such model, `HybridLMError` for options that cannot be.
        """
        if _device(device) == "cuda":
            from hybridlm.engine.cuda_open import open_engine

            return open_engine(cls, path, device, kv_type=kv_type, context=context, cache_bytes=cache_bytes,
                               checkpoint_every=checkpoint_every, exact=exact, invariant=batch_invariant,
                               ops={"kernels": False, "graphs": False} if plain else None)
        _need_native()
        from hybridlm.engine.cpu import CPU, file_loader
        from hybridlm.formats.gguf_reader import GGUFFile

        path = Path(path)
        if path.is_dir():
            raise FormatError(f"{path}: is a folder; convert it first (hybridlm convert {path} model.gguf)")
        file = GGUFFile.open(path)
        try:
            layout = Layout.of(file.config, file.fingerprint, _host_kv(kv_type))
            weights = bind(file.config, file_loader(file, str(path)))
            _set_threads(threads)
            return cls(weights, CPU(file.config, layout, exact), layout, name=path.stem, context=context, file=file,
                       model_bytes=path.stat().st_size, cache_bytes=cache_bytes,
                       checkpoint_every=checkpoint_every or CHECKPOINT_EVERY)
        except BaseException:
            file.close()
            raise

    @classmethod
    def random(cls, config: HybridConfig, type: str = "q4_0", seed: int = 0, *, threads: int | None = None,
               kv_type: str | None = None, context: int | None = None, cache_bytes: int | None = None,
               checkpoint_every: int | None = None, device: str = "cpu", batch_invariant: bool = False) -> Engine:
        """Random weights of a type in memory, without a file: for measuring speed at any size. It has no tokenizer.

        On a GPU the type is bfloat16, whatever `type` says.
        """
        if _device(device) == "cuda":
            from hybridlm.engine.cuda_open import random_engine

            return random_engine(cls, config, seed, device, kv_type=kv_type, context=context, cache_bytes=cache_bytes,
                                 checkpoint_every=checkpoint_every, invariant=batch_invariant)
        _need_native()
        from hybridlm.engine.cpu import CPU
        from hybridlm.engine.random_weights import RandomLoader

        loader = RandomLoader(config, type, seed)
        weights = bind(config, loader)
        layout = Layout.of(config, f"random {type} {seed} {config}", _host_kv(kv_type))
        _set_threads(threads)
        return cls(weights, CPU(config, layout), layout, name=f"random-{type}", context=context,
                   model_bytes=loader.nbytes, cache_bytes=cache_bytes,
                   checkpoint_every=checkpoint_every or CHECKPOINT_EVERY)

    # -- text ----------------------------------------------------------------------------------------------------

    @cached_property
    def tokenizer(self) -> Any:
        """The model's `Tokenizer`. Raises `FormatError` where the file has none."""
        from hybridlm.text.tokenizer import Tokenizer

        text = self._file.tokenizer_json if self._file else None
        if text is None:
            raise FormatError(f"{self.name}: has no tokenizer; give token ids, or convert the model again from a "
                              "folder with a tokenizer.json")
        eos = self.config.eos_token_ids
        return Tokenizer.from_json(text, eos=eos[0] if eos else None)

    @property
    def has_tokenizer(self) -> bool:
        return self._file is not None and self._file.tokenizer_json is not None

    @cached_property
    def chat_template(self) -> Any:
        """The model's `ChatTemplate`, or None: then it has no chat format and only continues text."""
        from hybridlm.text.chat import ChatTemplate

        source = self._file.chat_template if self._file else None
        if not source:
            return None
        ids = {"bos_token": self.config.bos_token_id, "eos_token": self.eos[0] if self.eos else None,
               "pad_token": self.config.pad_token_id}
        names = {k: self.tokenizer.id_to_token(i) for k, i in ids.items() if i is not None}
        return ChatTemplate(source, special_tokens={k: name for k, name in names.items() if name})

    @cached_property
    def eos(self) -> tuple[int, ...]:
        """Token ids that end a text: the configuration's, else the tokenizer's."""
        if self.config.eos_token_ids or not self.has_tokenizer:
            return self.config.eos_token_ids
        return () if self.tokenizer.eos is None else (self.tokenizer.eos,)

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a prompt; of an empty one the token that stands before a text."""
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else [int(t) for t in prompt]
        if not ids:
            start = [t for t in (self.config.bos_token_id, *self.eos) if t is not None]
            if not start:
                raise HybridLMError("prompt: empty, and this model has no token that begins a text; give some text")
            ids = start[:1]
        return ids

    def generate(self, prompt: str | Sequence[int], *, max_tokens: int | None = None, temperature: float = 1.0,
                 top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, repetition_penalty: float = 1.0,
                 seed: int | None = None, stop: str | Sequence[str] = (), ignore_eos: bool = False,
                 checkpoints: Sequence[int] = (), speculative: bool | Engine = False) -> Generation:
        """Continue a prompt: an iterator of `Piece`s, one a token, that also knows the whole afterwards.

        Args:
            prompt: text, in which the spelling of a special token becomes that token, or token ids.
            max_tokens: the most to generate; None until the context is full.
            temperature, top_k, top_p, min_p, repetition_penalty, seed: as `Sampler` explains; temperature 0 is greedy.
            stop: texts that end the output and are not part of it.
            ignore_eos: go on after the token that ends a text.
            checkpoints: positions in the prompt where a later prompt may part ways, kept in the prefix cache besides
                every `checkpoint_every`-th, the prompt's end and the output's.
            speculative: guess from what the text repeats and check several guesses in one pass. The output stays what
                it is (see `speculative.py`); text that repeats itself comes faster. An engine of a smaller model with
                the same vocabulary makes the guesses instead.
        """
        sampler = Sampler(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        return Generation(self, self.encode(prompt), sampler, max_tokens=max_tokens,
                          stop=(stop,) if isinstance(stop, str) else tuple(stop),
                          eos=() if ignore_eos else self.eos, checkpoints=checkpoints, speculative=speculative)

    def chat(self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] | None = None,
             template: Mapping[str, Any] | None = None, **options: Any) -> Generation:
        """Answer a conversation: `generate` on the rendered messages, `options` going there.

        `template`: names for the template. Raises `HybridLMError` where the model has none.
        """
        if self.chat_template is None:
            raise HybridLMError(f"{self.name}: has no chat template; continue text with generate instead")
        text, tokens, end = chat_prompt(self, messages, tools, template or {})
        generation = self.generate(tokens, checkpoints=(*options.pop("checkpoints", ()), end), **options)
        generation.prompt_text = text
        return generation

    # -- numbers -------------------------------------------------------------------------------------------------

    def logits(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Float32 [T, vocab]: row t is what follows tokens[0..t]."""
        return self.step([(self.session(), tokens)], every=True)

    def logprobs(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Float32 [T - 1]: the log-probability of each token but the first, given those before it."""
        return self.score([tokens])[0]

    def score(self, texts: Sequence[Sequence[int] | np.ndarray]) -> list[np.ndarray]:
        """`logprobs` of several texts, read side by side."""
        return self._passes.score([self._ids(tokens) for tokens in texts])

    def continuations(self, requests: Sequence[tuple[Sequence[int], Sequence[int]]],
                      prefix: int = 0) -> list[tuple[float, bool]]:
        """Of (context, continuation) pairs: the continuation's log-probability, and whether it is what greedy decoding
        writes. What contexts share is read once; their first `prefix` tokens, alike in all, also once for later calls.
        """
        from hybridlm.engine import branch, lockstep

        checked = [(self._ids(context), self._ids(continuation)) for context, continuation in requests]
        if not checked:
            return []
        start = lockstep.shared_state(self, checked[0][0][:prefix].tolist()) if prefix else None
        return branch.continuations(self._passes, checked, start)

    def generate_until(self, prompts: Sequence[Sequence[int]], max_tokens: int, stop: Sequence[str] = (),
                       prefix: int = 0) -> list[str]:
        """Greedy text after each prompt of token ids, up to a stop string; `prefix` as for `continuations`."""
        from hybridlm.engine.lockstep import generate_until

        return generate_until(self, [self._ids(p).tolist() for p in prompts], max_tokens, tuple(stop), prefix)

    def decode_bytes_per_token(self, context: int = 0) -> int:
        """Bytes that generating one token after `context` others must move through memory.

        All weights but the input table (unless it is the head too), the recurrent and convolution state read and
        written, keys and values read.
        """
        weights = sum(handle.nbytes for handle in read_each_step(self._weights))
        state = self.layout.fixed_bytes - 4 * self.layout.hidden
        return weights + 2 * state + self.layout.kv_bytes_read(context)

    @property
    def rows(self) -> int:
        """The most tokens of one pass."""
        return self._ops.slab or SLAB

    @property
    def memory(self) -> int:
        """Bytes of memory where states live: the machine's, or what the model leaves of a GPU's."""
        return _memory() if self.device == "cpu" else int(self._ops.memory())  # type: ignore[attr-defined]

    # -- sessions ------------------------------------------------------------------------------------------------

    def session(self) -> Session:
        """A new sequence."""
        return Session(self, self._ops.state())

    def resume(self, tokens: Sequence[int]) -> tuple[Session, int]:
        """A session that has read the longest prefix of `tokens` in the prefix cache, and that prefix's length."""
        checkpoint = self.cache.find(tokens)
        if checkpoint is None:
            return self.session(), 0
        session = Session(self, checkpoint.clone())
        return session, session.position

    def save_cache(self, path: str | Path) -> None:
        """Write the prefix cache to a file."""
        self.cache.save(path, repr(self.layout))

    def load_cache(self, path: str | Path) -> int:
        """Add what `save_cache` wrote for the same model; returns the number of checkpoints, 0 if it does not fit."""
        like = self._ops.state()

        def rebuild(tokens: list[int], own: bytes, blocks: list[Any]) -> State:
            if not all(type(t) is int and 0 <= t < self.config.vocab_size for t in tokens):
                raise ValueError
            return like.rebuilt(tokens, own, blocks)

        return self.cache.load(path, repr(self.layout), like.block_of, rebuild)

    def step(self, batch: Sequence[tuple[Session, Sequence[int] | np.ndarray]], every: bool = False,
             trial: bool = False) -> np.ndarray:
        """Read new tokens into several sessions at once, sharing each read of the weights.

        Float32 logits of what follows: [len(batch), vocab] after each session's last token, in order; with `every`
        [all tokens, vocab], row after row. With `trial` the sessions can `take_back` the last of these tokens, until
        their next step or snapshot; all tokens must then fit in one pass (256).

        The sessions must differ. When a pass is interrupted, all sessions in the batch become unusable.
        """
        parts = self._parts(batch)
        return self._passes.read_every(parts, trial) if every else self._passes.read(parts, trial)

    def feed(self, batch: Sequence[tuple[Session, Sequence[int] | np.ndarray]]) -> None:
        """`step` without logits."""
        self._passes.feed(self._parts(batch))

    def next_logits(self, sessions: Sequence[Session]) -> np.ndarray:
        """Float32 [len(sessions), vocab]: what follows the last token that each has read."""
        for session in sessions:
            session._check()
            if not session.position:
                raise HybridLMError("session: has read nothing yet; prefill it first")
        return self._passes.next_logits([session.state for session in sessions])

    def take_back(self, session: Session, count: int) -> None:
        """Make the session forget the last `count` tokens of its last step, which must have been a trial."""
        session._check()
        self._passes.take_back(session.state, count)

    def close(self) -> None:
        """Let go of the model file and the cache. The engine and its sessions must not be used afterwards."""
        self.cache.clear()
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Engine({self.name}, device={self.device}, kv_type={self.layout.kv_type}, context={self.context})"

    # -- inside --------------------------------------------------------------------------------------------------

    def _ids(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Tokens as int32, checked."""
        ids = np.asarray(tokens)
        if ids.ndim != 1 or not ids.size:
            raise HybridLMError("tokens: expected one or more token ids in a row")
        if ids.dtype.kind not in "iu":
            raise HybridLMError("tokens: expected whole numbers")
        low, high = ids.min(), ids.max()
        if low < 0 or high >= self.config.vocab_size:
            raise HybridLMError(f"tokens: {low if low < 0 else high} is outside the model's vocabulary of "
                                f"{self.config.vocab_size}")
        return ids.astype(np.int32)

    def _parts(self, batch: Sequence[tuple[Session, Sequence[int] | np.ndarray]]) -> list[Part]:
        """The states and tokens of a batch, checked."""
        if len({id(session.state) for session, _ in batch}) < len(batch):
            raise HybridLMError("batch: a session appears twice; join its tokens")
        parts = []
        for session, tokens in batch:
            session._check()
            if session.engine is not self:
                raise HybridLMError("session: belongs to another engine")
            parts.append((session.state, self._ids(tokens)))
        if not parts:
            raise HybridLMError("batch: empty; give at least one session with its tokens")
        return parts


def _device(device: str) -> str:
    from importlib.util import find_spec

    kind = str(device).split(":")[0]
    if kind not in ("cpu", "cuda"):
        raise HybridLMError(f'device: {device!r} is unknown; use "cpu" or "cuda"')
    missing = [name for name in ("torch", "triton") if kind == "cuda" and find_spec(name) is None]
    if missing:
        raise HybridLMError(f'device: a GPU needs {missing[0]}, which is not installed; pip install "hybridlm[gpu]"')
    return kind


def _host_kv(kv_type: str | None) -> str:
    if kv_type == "bf16":
        raise HybridLMError('kv_type: "bf16" is for GPUs; a processor keeps keys and values as f32, f16 or q8_0')
    return kv_type or "f16"


def _need_native() -> None:
    try:
        import hybridlm.native  # noqa: F401
    except ImportError as error:
        raise HybridLMError(f"the compiled kernels are missing or do not fit this Python ({error}); install hybridlm "
                            "again, with a C++ compiler at hand") from None


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        from hybridlm import native

        native.set_threads(_positive("threads", threads))


def _memory() -> int:
    """Bytes of memory that the machine has; 8 GB where it does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 8 << 30


def _positive(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise HybridLMError(f"{name}: must be a positive whole number, not {value!r}")
    return value
