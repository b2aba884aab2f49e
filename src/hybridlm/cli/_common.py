"""What several commands share: the MODEL argument, figures as JSON, sizes for people, the terminal."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

ModelArgument = Annotated[str, typer.Argument(
    metavar="MODEL", help="A GGUF file, a model folder, or a hub repository: owner/name[@revision][:type].")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text for people.")]
ThreadsOption = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads; all cores when left out.")]


def open_engine(model: str, **options: Any) -> Any:
    """An `Engine` on whatever MODEL names."""
    from hybridlm.engine import Engine
    from hybridlm.store import resolve

    return Engine.open(resolve(model), **options)


def print_json(figures: dict[str, Any]) -> None:
    """One object on one line of stdout; paths as strings, NaN refused."""
    print(json.dumps(figures, default=lambda v: str(v) if isinstance(v, Path) else v.item(), allow_nan=False))


def note(line: str) -> None:
    """A line for people, on stderr, so that stdout stays the result alone."""
    print(line, file=sys.stderr, flush=True)


def peak_rss_bytes() -> int:
    """The most memory this process has held, bytes; file-backed pages that were read (an open model) count."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def size(n: float) -> str:
    """Bytes for people: 512 B, 1.5 MB, 14.9 GB (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000 or unit == "GB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    raise AssertionError
