"""A server in a thread, over an engine that says what a script tells it: what a client sees then depends on the server
alone, not on a small model's skill."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import uvicorn
from tests.engine.helpers import reference_engine, small_config
from tests.text.helpers import byte_level

from hybridlm.server.app import create_app
from hybridlm.server.models import Model
from hybridlm.server.settings import Settings
from hybridlm.text import CHATML

TOKENIZER = byte_level()
ANSWER = "<|im_start|>assistant\n"
# CHATML, with thoughts opened before the answer.
THINKING = CHATML.replace("assistant\\n'", "assistant\\n<think>\\n'")


def scripted_engine(script=None, template: str | None = CHATML, **options: Any) -> Any:
    """An engine whose answer to a rendered conversation is `script(text)`; beside the script, noise."""
    file = SimpleNamespace(tokenizer_json=TOKENIZER.to_json(), chat_template=template, close=lambda: None)
    config = small_config(vocab_size=TOKENIZER.vocab_size, eos_token_id=TOKENIZER.eos, max_position_embeddings=2048)
    engine = reference_engine(config, file=file, **{"name": "scripted", "cache_bytes": 64 << 20, **options})
    if script is None:
        return engine
    real = engine.next_logits

    def said(session) -> np.ndarray | None:
        text = TOKENIZER.decode(session.tokens)
        history, found, begun = text.rpartition(ANSWER)
        if not found:
            return None
        begun = begun.removeprefix("<think>\n") if template == THINKING else begun
        ids = [*TOKENIZER.encode(script(history)), TOKENIZER.token_to_id("<|im_end|>")]
        for k in range(len(ids)):
            if (not k or session.tokens[-k:] == ids[:k]) and TOKENIZER.decode(ids[:k]) == begun:
                row = np.zeros(config.vocab_size, np.float32)
                row[ids[k]] = 60
                return row
        return None

    def next_logits(sessions):
        rows = real(sessions)
        for i, session in enumerate(sessions):
            if (row := said(session)) is not None:
                rows[i] = row
        return rows

    def step(batch, every=False, trial=False):
        engine.feed(batch)
        return next_logits([session for session, _ in batch])

    engine.next_logits, engine.step = next_logits, step
    return engine


@contextlib.contextmanager
def serving(engines: dict[str, Any], settings: Settings | None = None):
    """The address of a server of engines (or functions that open them), closed afterwards; `.app` is inside it."""
    models = [Model(name, engine if callable(engine) else (lambda e=engine: e), pinned=i == 0)
              for i, (name, engine) in enumerate(engines.items())]
    app = create_app(models, settings or Settings(request_seconds=60))
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="on", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
        assert thread.is_alive()
    try:
        yield SimpleNamespace(url=f"http://127.0.0.1:{listener.getsockname()[1]}", app=app, server=server,
                              loaded=lambda name=None: app.state.models.find(name).loaded)
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()
        assert not thread.is_alive()
