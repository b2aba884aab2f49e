"""What can be set about the server. `hybridlm serve --help` explains each; the defaults are safe on a laptop."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Settings"]


@dataclass(slots=True)
class Settings:
    """Sizes in bytes, times in seconds."""

    # models
    device: str = "cpu"
    threads: int | None = None
    kv_type: str | None = None  # as the device likes best
    context: int | None = None
    chat_template: str | None = None  # "chatml", or a template's text, for models that have none
    model_bytes: int | None = None  # for open models; None is half of the machine's memory
    idle_seconds: float = 1800.0  # after which a model that was not preloaded is closed; 0 is never
    # prefix cache
    cache_bytes: int | None = None
    cache_folder: Path | None = None  # where it outlives the process; None keeps it in memory only
    cache_disk_bytes: int = 16 * 10**9  # of each model
    cache_save_seconds: float = 300.0
    # scheduling
    running: int = 256
    waiting: int = 512
    state_bytes: int | None = None
    request_seconds: float = 600.0
    max_tokens: int | None = None  # the most that a request may ask for
    shutdown_seconds: float = 30.0
    # who may come, and with what
    host: str = "127.0.0.1"
    port: int = 8080
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    cors: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()  # names by which the server may be addressed besides its own
    rate: int = 0  # requests a minute of one key or address; 0 is any
    body_bytes: int = 8 << 20
    body_seconds: float = 20.0
    send_seconds: float = 60.0
    log: str = "text"  # or "json"
