"""What several commands share: the MODEL argument, figures as JSON, sizes for people, the terminal."""

from __future__ import annotations

import json
import os
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from hybridlm.engine import Engine

ModelArgument = Annotated[str, typer.Argument(
    metavar="MODEL", help="A GGUF file, a model folder, or a hub repository as owner/name, "
                           "owner/name@revision or owner/name:q8_0.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text for people.")]
ThreadsOption = Annotated[int | None, typer.Option("--threads", "-t", min=1,
                                                   help="CPU threads; all cores when left out.")]
ContextOption = Annotated[int | None, typer.Option("--context", min=1, rich_help_panel="Machine",
                                                   help="Most tokens of a text; what the model was made for when left "
                                                        "out.")]
KVOption = Annotated[str | None, typer.Option("--kv-type", rich_help_panel="Machine",
                                              help="How keys and values are kept: f32, f16 (when left out) or q8_0; "
                                                   "on a GPU bf16 (when left out), f16 or f32.")]
DeviceOption = Annotated[str, typer.Option("--device", rich_help_panel="Machine",
                                           help="cpu, cuda (or cuda:1), or auto: a GPU where there is one.")]
DraftOption = Annotated[str | None, typer.Option("--draft", metavar="MODEL", rich_help_panel="Machine",
                                                 help="A smaller model with the same tokenizer that guesses ahead: "
                                                      "what comes out stays the same, and comes faster where guesses "
                                                      "are good.")]
# Sampling, the same in generate and chat.
TemperatureOption = Annotated[float, typer.Option("--temperature", rich_help_panel="Sampling",
                                                  help="0 always takes the most probable token; more is wilder.")]
TopKOption = Annotated[int, typer.Option("--top-k", rich_help_panel="Sampling",
                                         help="Only the k most probable tokens; 0 is off.")]
TopPOption = Annotated[float, typer.Option("--top-p", rich_help_panel="Sampling",
                                           help="Only the most probable tokens that together reach p; 1 is off.")]
MinPOption = Annotated[float, typer.Option("--min-p", rich_help_panel="Sampling",
                                           help="Only tokens with at least this share of the best one's probability; "
                                                "0 is off.")]
PenaltyOption = Annotated[float, typer.Option("--repetition-penalty", rich_help_panel="Sampling",
                                              help="Above 1 makes tokens that have occurred less probable.")]
SeedOption = Annotated[int | None, typer.Option("--seed", rich_help_panel="Sampling",
                                                help="Makes sampled text repeatable.")]


def resolved(model: str, device: str = "cpu") -> Path:
    """The GGUF file of whatever MODEL names, fetched and converted with progress shown where that is needed. A GPU
    reads a folder as it is."""
    if device.startswith("cuda") and Path(model).is_dir():
        return Path(model)
    from hybridlm.cli._progress import Stages
    from hybridlm.store import resolve

    with Stages() as stages:
        return resolve(model, progress=stages)


def open_engine(model: str, device: str = "cpu", **options: Any) -> Engine:
    """An `Engine` on whatever MODEL names."""
    from hybridlm.engine import Engine
    from hybridlm.engine.device import choose

    device = choose(device)
    return Engine.open(resolved(model, device), device, **options)


def print_json(figures: dict[str, Any]) -> None:
    """One object on one line of stdout; paths as strings, NaN refused."""
    print(json.dumps(figures, default=lambda v: str(v) if isinstance(v, Path) else v.item(), allow_nan=False))


def note(line: str) -> None:
    """A line for people, on stderr, so that stdout stays the result alone; in a terminal wrapped at words, and dim."""
    if sys.stderr.isatty():
        import shutil
        import textwrap

        width = shutil.get_terminal_size().columns
        line = "\n".join(part if len(part) < width else textwrap.fill(part, width) for part in line.split("\n"))
        if not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb":
            line = f"\x1b[2m{line}\x1b[0m"
    print(line, file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """Text from a model without control characters that could move the cursor or change the terminal."""
    return "".join(c for c in text if c in "\n\t" or (c >= " " and not "\x7f" <= c <= "\x9f"))


def peak_rss_bytes() -> int:
    """The most memory this process has held, bytes; file-backed pages that were read (an open model) count."""
    with suppress(OSError):  # Linux: of this program alone, where getrusage counts the one that started it too
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        if match := re.search(r"VmHWM:\s+(\d+) kB", status):
            return int(match[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def count(n: float) -> str:
    """Parameters for people: 194k, 22.3M, 7.43B."""
    if n < 1e6:
        return f"{n / 1e3:.0f}k"
    return f"{n / 1e6:.1f}M" if n < 1e9 else f"{n / 1e9:.2f}B"


def size(n: float) -> str:
    """Bytes for people: 512 B, 1.5 MB, 14.9 GB (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000 or unit == "GB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    raise AssertionError
