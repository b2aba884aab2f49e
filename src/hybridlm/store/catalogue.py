"""What the store holds: the models that were fetched or converted, by the names that open them; and aliases.

    HYBRIDLM_HOME/aliases.json   {"NAME": "MODEL", ...}
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from hybridlm.atomic import write_file
from hybridlm.errors import HybridLMError, ModelNotFoundError
from hybridlm.store.cache import Report, home, locked

__all__ = ["Entry", "aliases", "entries", "remove", "set_alias"]

_ALIAS = re.compile(r"[A-Za-z0-9][\w.-]{0,63}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Entry:
    """A file in the store under a name that `resolve` takes."""

    name: str
    path: Path
    nbytes: int
    modified: float
    note: Path  # that gives the name to the file


def entries() -> list[Entry]:
    """Hub models by name. A name without a revision or type comes before those with."""
    found = []
    for note in sorted((home() / "hub").glob("*/refs/*.json")):
        root = note.parent.parent
        try:
            path = root / json.loads(note.read_text(encoding="utf-8"))["file"]
            stat = path.stat()
        except (OSError, ValueError, KeyError, TypeError):
            continue
        revision, _, kind = note.name.removesuffix(".json").partition(".")
        if revision != "main" and "." in unquote(revision):  # quote leaves dots: v1.0.q8_0 is v1.0 and q8_0
            revision, kind = note.name.removesuffix(".json"), ""
        name = root.name.replace("--", "/", 1)
        name += ("" if unquote(revision) == "main" else f"@{unquote(revision)}") + (f":{kind}" if kind else "")
        found.append(Entry(name, path, stat.st_size, stat.st_mtime, note))
    return found


def remove(name: str, report: Report) -> int:
    """Delete a model: a name as `entries` tells it, or OWNER/NAME for all that was fetched of it. Returns the bytes
    that are free now. Raises `ModelNotFoundError` for what is not there."""
    names = aliases()
    if name in names:
        _write({k: v for k, v in names.items() if k != name})
        return 0
    mine = [e for e in entries() if e.name == name]
    root = home() / "hub" / name.replace("/", "--", 1)
    whole = bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII)) and ".." not in name and root.is_dir()
    if not mine and not whole:
        raise ModelNotFoundError(f"{name}: not in the store; hybridlm list shows what is")
    if whole:
        with locked(root / ".lock", report):
            nbytes = sum(f.stat().st_size for f in root.rglob("*") if f.is_file())
            for child in root.iterdir():
                if child.name != ".lock":
                    shutil.rmtree(child) if child.is_dir() else child.unlink()
        shutil.rmtree(root, ignore_errors=True)
        return nbytes
    root = home() / "hub" / name.partition("@")[0].partition(":")[0].replace("/", "--", 1)
    with locked(root / ".lock", report):
        others = {e.path for e in entries() if e.name != name}
        freed = 0
        for entry in mine:
            entry.note.unlink()
            if entry.path not in others:
                freed += entry.nbytes
                entry.path.unlink()
                with contextlib.suppress(OSError):
                    entry.path.parent.rmdir()
    return freed


def aliases() -> dict[str, str]:
    """Names that stand for a MODEL."""
    try:
        found = json.loads((home() / "aliases.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in found.items() if isinstance(v, str)} if isinstance(found, dict) else {}


def set_alias(name: str, model: str) -> None:
    """Let `name` stand for a MODEL."""
    if not _ALIAS.fullmatch(name):
        raise HybridLMError(f"alias: {name!r} is no name; use letters, digits, dots, dashes, 64 at most")
    _write({**aliases(), name: model})


def _write(names: dict[str, str]) -> None:
    home().mkdir(parents=True, exist_ok=True)
    write_file(home() / "aliases.json", (json.dumps(names, indent=1, sort_keys=True) + "\n").encode())
