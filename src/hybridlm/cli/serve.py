"""`hybridlm serve MODEL...`: OpenAI's, Ollama's and Anthropic's APIs and a chat page, on this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from hybridlm.cli._common import ContextOption, DeviceOption, KVOption, ThreadsOption, note, resolved
from hybridlm.errors import HybridLMError

_SIZES = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "k": 10**3, "m": 10**6, "g": 10**9, "": 1}


def _size(text: str) -> int:
    """Bytes from 512MB, 4g, 1000000."""
    word = text.strip().lower()
    number = word.rstrip("kmgb")
    try:
        return int(float(number) * _SIZES[word[len(number):]])
    except (ValueError, KeyError, OverflowError):
        raise typer.BadParameter(f"{text!r} is no size; write for instance 800MB or 4GB") from None


def _option(*names: str, help: str, panel: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


def command(
    models: Annotated[list[str] | None, typer.Argument(metavar="[MODEL]...", help="GGUF files, folders or hub "
                      "repositories, each perhaps as NAME=MODEL, by which name clients then ask for it. The first is "
                      "opened at once, the others when asked for. Without any, all models of the store.")] = None,
    host: Annotated[str, _option("--host", help="The address to listen on. The default is reached from this machine "
                                 "only; 0.0.0.0 is reached by everybody (give --api-key then).", panel="Access")]
    = "127.0.0.1",
    port: Annotated[int, _option("--port", "-p", min=0, max=65535, help="The port to listen on.",
                                     panel="Access")] = 8080,
    api_key: Annotated[list[str] | None, _option("--api-key", envvar="HYBRIDLM_API_KEYS", help="A key that clients "
                       "must send, as Authorization: Bearer or x-api-key; repeatable. Better in HYBRIDLM_API_KEYS, "
                       "several with spaces between: arguments are seen by other users of the machine.",
                       panel="Access")] = None,
    cors: Annotated[list[str] | None, _option("--cors", metavar="ORIGIN", help="An origin (https://example.org) whose "
                    "pages may use the server from a browser; repeatable. None may unless named.",
                    panel="Access")] = None,
    allow_host: Annotated[list[str] | None, _option("--allow-host", metavar="NAME", help="A name, besides loopback "
                          "ones, by which clients may address a server on a loopback address (behind a proxy).",
                          panel="Access")] = None,
    rate: Annotated[int, _option("--rate", min=0, help="Most requests a minute of one key, or address where there are "
                                 "no keys; 0 is any number.", panel="Limits")] = 0,
    max_body: Annotated[str, _option("--max-body", help="Largest request body; larger ones get 413.",
                                     panel="Limits")] = "8MB",
    max_tokens: Annotated[int | None, _option("--max-tokens", min=1, help="Most tokens of any output, whatever a "
                          "request asks for; the context's end when left out.", panel="Limits")] = None,
    timeout: Annotated[float, _option("--timeout", min=0, help="Seconds after which an output is cut (finish reason "
                                      "length); 0 is never.", panel="Limits")] = 600,
    queue: Annotated[int, _option("--queue", min=0, help="Most requests that wait; more get 429 with Retry-After.",
                                  panel="Limits")] = 512,
    parallel: Annotated[int, _option("--parallel", min=1, help="Most outputs read or written at the same time.",
                                     panel="Limits")] = 256,
    state_memory: Annotated[str | None, _option("--state-memory", help="Memory for the states of running outputs; "
                            "further ones wait. A quarter of the machine's when left out.", panel="Limits")] = None,
    cache: Annotated[str | None, _option("--cache", help="Memory of each model's prefix cache; 0 turns it off, a tenth "
                     "of the machine's when left out.", panel="Prefix cache")] = None,
    keep_cache: Annotated[bool, _option("--keep-cache", help="Keep the prefix cache on disk too, so that a restarted "
                          "server need not read prompts again. It holds what was said, as numbers.",
                          panel="Prefix cache")] = False,
    cache_dir: Annotated[Path | None, _option("--cache-dir", help="The folder for --keep-cache; prefix-cache in the "
                         "store's folder when left out.", panel="Prefix cache")] = None,
    cache_disk: Annotated[str, _option("--cache-disk", help="Disk space for --keep-cache, of each model. What has to "
                          "leave memory goes there and comes back when a prompt begins with it.",
                          panel="Prefix cache")] = "16GB",
    save_every: Annotated[float, _option("--save-every", min=1, help="Seconds between savings, while the server runs, "
                          "of what the cache has in memory only; that is saved at the end too.",
                          panel="Prefix cache")] = 300,
    memory: Annotated[str | None, _option("--memory", help="Memory for open models with their caches: to open another "
                      "one, idle ones are closed. Half of the machine's when left out.", panel="Models")] = None,
    idle: Annotated[float, _option("--idle", min=0, help="Seconds after which an unused model is closed (never the "
                                   "first one named); 0 is never.", panel="Models")] = 1800,
    chat_template: Annotated[str | None, _option("--chat-template", help="For models without one: chatml, or a file "
                             "with a Jinja template. A model that was not taught to chat answers poorly.",
                             panel="Models")] = None,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    context: ContextOption = None,
    kv_type: KVOption = None,
    grace: Annotated[float, _option("--grace", min=0, help="Seconds that running outputs get when the server is told "
                                    "to stop.", panel="Machine")] = 30,
    log: Annotated[str, _option("--log", help="Form of the log on stderr: text or json. It names models, sizes and "
                                "times, never what was said.", panel="Machine")] = "text",
) -> None:
    """Serve models over HTTP: OpenAI's, Ollama's and Anthropic's APIs, and a chat page at the address itself.

    hybridlm serve models/hybridlm-tiny-q8_0.gguf
    """
    from hybridlm.engine.device import choose
    from hybridlm.server.guard import is_loopback
    from hybridlm.server.run import run
    from hybridlm.server.settings import Settings
    from hybridlm.store import home

    if log not in ("text", "json"):
        raise typer.BadParameter("text or json", param_hint="--log")
    keys = tuple(k for group in api_key or () for k in group.split())
    settings = Settings(
        device=choose(device), threads=threads, kv_type=kv_type, context=context,
        chat_template=_template(chat_template),
        model_bytes=None if memory is None else _size(memory), idle_seconds=idle,
        cache_bytes=None if cache is None else _size(cache),
        cache_folder=(cache_dir or home() / "prefix-cache") if keep_cache or cache_dir else None,
        cache_disk_bytes=_size(cache_disk), cache_save_seconds=save_every, running=parallel, waiting=queue,
        state_bytes=None if state_memory is None else _size(state_memory), request_seconds=timeout,
        max_tokens=max_tokens, shutdown_seconds=grace, host=host, port=port, api_keys=keys, cors=tuple(cors or ()),
        hosts=tuple(allow_host or ()), rate=rate, body_bytes=_size(max_body), log=log)
    if not keys and not is_loopback(host):
        note(f"warning: everybody who reaches {host} can use this server; give --api-key")
    run(_models(models or [], settings), settings, note)


def _models(names: list[str], settings: Any) -> list[Any]:
    from hybridlm.server.models import Model, opener
    from hybridlm.store.catalogue import entries

    found: list[Any] = []
    for text in names:
        alias, sign, model = text.partition("=")
        if not sign or "/" in alias or os.sep in alias:
            alias, model = "", text
        path = resolved(model, settings.device)
        found.append(Model(alias or (path.stem if Path(model).exists() else model), opener(path, settings),
                           _nbytes(path), path.stat().st_mtime, pinned=not found))
    if not names:
        found = [Model(e.name, opener(e.path, settings), e.nbytes, e.modified) for e in entries()]
        if not found:
            raise HybridLMError("no model to serve: name one, for instance hybridlm serve model.gguf, or fetch one "
                                "with hybridlm pull OWNER/NAME")
    if len({m.name for m in found}) < len(found):
        raise HybridLMError("two models have one name; give them names as NAME=MODEL")
    return found


def _nbytes(path: Path) -> int:
    return sum(p.stat().st_size for p in path.glob("*.safetensors")) if path.is_dir() else path.stat().st_size


def _template(text: str | None) -> str | None:
    if text is None or text == "chatml":
        return text
    try:
        return Path(text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise HybridLMError(f"--chat-template: {text} cannot be read ({error})") from None
