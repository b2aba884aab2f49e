"""The models of a server: which there are, which are open, what makes room for another.

A model is opened when it is first asked for, and closed when it has been idle for long or when another one needs its
memory. Requests hold it open (`use`). Clients name models by the names given when the server was started or by those
in the store; a name is looked up in that list and never opened as a path.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridlm.engine.scheduler import Scheduler
from hybridlm.errors import HybridLMError
from hybridlm.server.errors import ApiError
from hybridlm.server.settings import Settings

if TYPE_CHECKING:
    from hybridlm.engine import Engine
    from hybridlm.server.constraint import Grammar

__all__ = ["Loaded", "Model", "Models"]

log = logging.getLogger("hybridlm.server")


class Loaded:
    """An open model with its scheduler."""

    def __init__(self, name: str, engine: Engine, settings: Settings) -> None:
        self.name, self.engine, self.settings = name, engine, settings
        self.scheduler = Scheduler(engine, running=settings.running, waiting=settings.waiting,
                                   state_bytes=settings.state_bytes)
        self.created = int(time.time())
        self.users = 0
        self.used = time.monotonic()
        self.keep_seconds: float | None = None  # after the last use, as a client wished
        self._grammar: Grammar | None = None
        self._turn_end: tuple[int, ...] | None = None
        self._saved = 0
        if file := self.cache_file:
            found = engine.load_cache(file)
            self._saved = engine.cache.stats.stored
            log.info("prefix cache loaded", extra={"data": {"model": name, "checkpoints": found}})

    @property
    def can_chat(self) -> bool:
        return self.engine.has_tokenizer and self.engine.chat_template is not None

    @property
    def nbytes(self) -> int:
        """Memory it is responsible for, at most."""
        return self.engine.model_bytes + self.engine.cache.budget

    @property
    def grammar(self) -> Grammar:
        from hybridlm.server.constraint import Grammar

        if self._grammar is None:
            self._grammar = Grammar(self.engine, self.ends)
        return self._grammar

    @property
    def ends(self) -> tuple[int, ...]:
        """Tokens that end an answer: those that end a text, and the one that the template writes after an answer."""
        if self._turn_end is None:
            from hybridlm.engine.chat import turn_end

            token = self.engine.tokenizer.token_to_id(turn_end(self.engine)) if self.can_chat else None
            self._turn_end = () if token is None else (token,)
        return (*self.engine.eos, *self._turn_end)

    @property
    def cache_file(self) -> Path | None:
        """Where the prefix cache outlives the process: a name of its own for each model and layout."""
        if self.settings.cache_folder is None:
            return None
        key = hashlib.sha256(repr(self.engine.layout).encode()).hexdigest()[:16]
        return self.settings.cache_folder / f"{''.join(c if c.isalnum() else '-' for c in self.name)}-{key}.cache"

    def save_cache(self) -> None:
        """Write the prefix cache, if anything has come in since the last time."""
        stored = self.engine.cache.stats.stored
        if (file := self.cache_file) and stored != self._saved:
            self._saved = stored
            try:  # what was said is for the server's user alone
                file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                self.engine.save_cache(file)
                file.chmod(0o600)
            except (HybridLMError, OSError) as error:
                log.warning("prefix cache not saved", extra={"data": {"model": self.name, "error": str(error)}})

    def close(self, seconds: float = 0.0) -> None:
        self.scheduler.close(seconds)
        self.save_cache()
        self.engine.close()


@dataclass(slots=True)
class Model:
    """A model that can be asked for."""

    name: str
    open: Callable[[], Engine]  # called in a thread
    nbytes: int = 0  # of its file, where known before it is open
    modified: float = 0.0
    pinned: bool = False  # never closed for being idle
    loaded: Loaded | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Models:
    """By name. All methods belong to the event loop's thread."""

    def __init__(self, models: list[Model], settings: Settings) -> None:
        self.settings = settings
        self.all = {model.name: model for model in models}
        self.ready = False

    def find(self, name: str | None) -> Model:
        """The model of a name, as clients write it; without one the first. Raises `ApiError` 404."""
        if not self.all:
            raise ApiError(404, "model: none is served; start the server with one, or pull one")
        if not name:
            return next(iter(self.all.values()))
        for wanted in (name, name.removesuffix(":latest")):
            if wanted in self.all:
                return self.all[wanted]
        known = ", ".join(list(self.all)[:8])
        raise ApiError(404, f"model: {name[:200]!r} is not served here; there is {known}", param="model")

    @property
    def open(self) -> list[Loaded]:
        return [model.loaded for model in self.all.values() if model.loaded is not None]

    @asynccontextmanager
    async def use(self, name: str | None) -> AsyncIterator[Loaded]:
        """The open model of a name, held open meanwhile."""
        model = self.find(name)
        async with model.lock:
            if model.loaded is None:
                await self._open(model)
            loaded = model.loaded
            assert loaded is not None
            loaded.users += 1
        try:
            yield loaded
        finally:
            loaded.users -= 1
            loaded.used = time.monotonic()

    async def preload(self) -> None:
        """Open the pinned models; the server is ready afterwards."""
        for model in self.all.values():
            if model.pinned:
                async with self.use(model.name):
                    pass
        self.ready = True

    async def _open(self, model: Model) -> None:
        await self._make_room(model)
        began = time.monotonic()
        engine = await asyncio.to_thread(model.open)
        model.loaded = await asyncio.to_thread(Loaded, model.name, engine, self.settings)
        log.info("model opened", extra={"data": {"model": model.name, "seconds": round(time.monotonic() - began, 3),
                                                 "bytes": engine.model_bytes}})

    async def _make_room(self, model: Model) -> None:
        from hybridlm.engine.engine import _memory

        budget = self.settings.model_bytes or _memory() // 2
        others = [m for m in self.all.values() if m.loaded is not None]
        for other in sorted(others, key=lambda m: m.loaded.used if m.loaded else 0):
            need = model.nbytes + sum(m.loaded.nbytes for m in others if m.loaded is not None)
            if need <= budget:
                return
            if other.loaded is not None and not other.loaded.users:
                await self.unload(other)
        if any(m.loaded is not None and m.loaded.users for m in others):
            raise ApiError(503, f"model: no memory for {model.name} while others are in use; try again later",
                           retry_after=10)

    async def unload(self, model: Model) -> None:
        """Close a model that nobody uses."""
        async with model.lock:
            loaded = model.loaded
            if loaded is None or loaded.users:
                return
            model.loaded = None
            await asyncio.to_thread(loaded.close)
            log.info("model closed", extra={"data": {"model": model.name}})

    def until(self, model: Model, loaded: Loaded) -> float:
        """When a model that nobody uses any more would be closed, on the monotonic clock."""
        if loaded.keep_seconds is not None:
            return loaded.used + loaded.keep_seconds
        return loaded.used + self.settings.idle_seconds if self.settings.idle_seconds and not model.pinned else math.inf

    async def tend(self) -> None:
        """For ever: close what is idle, save what should outlive a crash."""
        saved = time.monotonic()
        while True:
            await asyncio.sleep(1.0)
            now = time.monotonic()
            for model in list(self.all.values()):
                if (loaded := model.loaded) is None:
                    continue
                if now > self.until(model, loaded) and not loaded.users:
                    await self.unload(model)
            if now - saved > self.settings.cache_save_seconds:
                for loaded in self.open:
                    await asyncio.to_thread(loaded.save_cache)
                saved = time.monotonic()

    async def close(self) -> None:
        """At the end: fail what still runs, save the caches."""
        self.ready = False
        for model in self.all.values():
            if model.loaded is not None:
                with contextlib.suppress(Exception):
                    await asyncio.to_thread(model.loaded.close)
                model.loaded = None


def opener(path: Path | Callable[[], Path], settings: Settings) -> Callable[[], Any]:
    """What opens the engine of a file."""

    def open_engine() -> Engine:
        from hybridlm.engine import Engine
        from hybridlm.text.chat import CHATML, ChatTemplate

        engine = Engine.open(path() if callable(path) else path, settings.device, settings.threads, settings.kv_type,
                             settings.context, cache_bytes=settings.cache_bytes)
        if settings.chat_template and engine.has_tokenizer and engine.chat_template is None:
            source = CHATML if settings.chat_template == "chatml" else settings.chat_template
            engine.__dict__["chat_template"] = ChatTemplate(source)
        return engine

    return open_engine
