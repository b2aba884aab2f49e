"""Running the application under uvicorn: the socket, the signals, the end."""

from __future__ import annotations

import logging
import socket
import sys
from collections.abc import Callable

import uvicorn

from hybridlm.errors import HybridLMError
from hybridlm.server.app import create_app
from hybridlm.server.guard import set_up_logging
from hybridlm.server.models import Model
from hybridlm.server.settings import Settings

__all__ = ["run"]


def run(models: list[Model], settings: Settings, say: Callable[[str], None]) -> None:
    """Serve until told to stop (SIGTERM, Ctrl-C): then nothing new is taken, running outputs get their time, caches
    are saved. Raises `HybridLMError` when the address cannot be had or the first model not
    be opened."""
    set_up_logging(settings.log)
    sys.setswitchinterval(0.001)  # the scheduler's thread and the event loop take turns often
    app = create_app(models, settings)
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # what matters is in our own log
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="on",
                            timeout_graceful_shutdown=max(1, round(settings.shutdown_seconds)), server_header=False,
                            timeout_keep_alive=75, h11_max_incomplete_event_size=64 << 10)
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((settings.host, settings.port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise HybridLMError(f"{settings.host}:{settings.port}: cannot listen there ({error.strerror}); choose another "
                            "--port or --host") from None
    port = listener.getsockname()[1]
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    say(f"Serving {', '.join(m.name for m in models)} at http://{host}:{port} (Ctrl-C stops)")
    with listener:
        try:
            uvicorn.Server(config).run(sockets=[listener])
        except SystemExit:  # uvicorn's, when the beginning failed
            if app.state.failed is not None:
                raise app.state.failed from None
            raise
