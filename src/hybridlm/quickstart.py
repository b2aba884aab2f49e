"""The whole road once, on any machine, in minutes: text -> tokenizer -> training -> evaluation -> GGUF -> text.

Nothing is downloaded. The text is the Python standard library that runs this program, source files, some of them held
out by the hash of their content. A hybrid of a million weights learns from it for a minute and a half. It will not
write programs; it will show the loss falling, the file it becomes, and that the quantised file predicts the held-out
sources as well as the original does.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

from hybridlm.atomic import write_file
from hybridlm.errors import DataError

__all__ = ["quickstart"]

HELD_OUT = 32  # one file in so many
HELD_OUT_BYTES = 100_000  # enough for three digits, little enough to score in seconds
TRAIN_BYTES = 6_000_000  # more than is read in the time
PROMPT = "def read_lines(path):\n"


def quickstart(out: Path, *, seconds: float = 90.0) -> None:
    """Leave a trained model in `out`/hf and its quantised file in `out`/model-q8_0.gguf, telling each stage.

    Stopped and run again, it goes on where it was. Raises a `HybridLMError` where a stage cannot be done.
    """
    from hybridlm.train import run

    began = time.monotonic()
    train, held_out = out / "corpus" / "train.jsonl", out / "corpus" / "held-out.jsonl"
    _title("1  Text: the Python standard library of this machine")
    if not held_out.exists():
        corpus(Path(sysconfig.get_path("stdlib")), train, held_out)
    _say(f"{_count(train)} files to learn from ({train.stat().st_size / 1e6:.1f} MB), {_count(held_out)} held out")

    _title(f"2  Tokenizer, then {seconds:.0f} seconds of training a hybrid of a million weights")
    run("tiny", {
        "data": str(train), "val": str(held_out), "out": str(out), "vocab": "2048", "seconds": str(seconds),
        "batch": "4", "sequence": "256", "lr": "5e-3", "warmup": "20", "decay": "0.5", "val_every": "100",
        "val_tokens": "8000", "save_every": "100", "dtype": "bfloat16" if _fast_bfloat16() else "float32",
        "threads": str(min(8, _cores())), "tensorboard": "false",
    })

    _title("3  One file: GGUF, weights in 8 bits")
    gguf = out / "model-q8_0.gguf"
    _convert(out / "hf", gguf)

    _title("4  Bits per byte of the held-out files, lower is better")
    _compare(out, gguf, held_out)

    _title("5  Text from the quantised file")
    _generate(gguf)
    _say(f"\nAll of it took {time.monotonic() - began:.0f} seconds. Go on with:\n"
         f"  hybridlm generate {gguf} \"import \" --stats\n"
         f"  hybridlm train tiny data=YOUR_TEXT out=runs/mine")


# -- text --------------------------------------------------------------------------------------------------------------


def corpus(library: Path, train: Path, held_out: Path) -> None:
    """Write the library's sources as two files of JSON lines, each file falling on its side by its content's hash."""
    sides: dict[Path, list[str]] = {train: [], held_out: []}
    sizes = {train: 0, held_out: 0}
    for digest, text in sorted(_sources(library)):  # in the order of hashes: a fair sample, whatever the limit
        side = held_out if int(digest[:8], 16) % HELD_OUT == 0 else train
        if sizes[side] + len(text) <= (HELD_OUT_BYTES if side is held_out else TRAIN_BYTES):
            sides[side].append(json.dumps({"text": text}))
            sizes[side] += len(text)
    if not sides[train] or not sides[held_out]:
        raise DataError(f"{library}: holds no Python sources to learn from; run `hybridlm train tiny data=PATH` "
                        "on text of your own")
    train.parent.mkdir(parents=True, exist_ok=True)
    for file, rows in sides.items():
        write_file(file, ("\n".join(rows) + "\n").encode())


def _sources(library: Path) -> Iterator[tuple[str, str]]:
    """(hash, text) of the library's own sources: no tests, nothing that was installed beside it."""
    seen = set()
    for file in sorted(library.rglob("*.py")):
        parts = file.relative_to(library).parts
        if {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"} & {*parts}:
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        digest = hashlib.sha256(text.encode()).hexdigest()
        if 500 <= len(text) <= 200_000 and digest not in seen:
            seen.add(digest)
            yield digest, text


def _count(file: Path) -> int:
    return file.read_bytes().count(b"\n")


# -- the file and what it is worth ------------------------------------------------------------------------------------


def _convert(folder: Path, gguf: Path) -> None:
    from hybridlm.formats.convert import convert

    summary = convert(folder, gguf, "q8_0")
    weights = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    _say(f"{gguf}: {gguf.stat().st_size / 1e6:.2f} MB, weights, tokenizer and configuration "
         f"({weights / 1e6:.2f} MB of bfloat16 weights in {folder.name}/); {summary.bits_per_weight:.2f} bits a weight")


def _compare(out: Path, gguf: Path, held_out: Path) -> None:
    from hybridlm.engine import Engine
    from hybridlm.evals import bits_per_byte, documents_of
    from hybridlm.evals.torch_scorer import TorchScorer
    from hybridlm.model import HybridLM
    from hybridlm.text import Tokenizer

    tokenizer = Tokenizer.from_file(out / "hf")
    model = HybridLM.from_pretrained(out / "hf").float()
    documents = list(documents_of([held_out]))
    original = bits_per_byte(TorchScorer(model), tokenizer, documents)
    with Engine.open(gguf) as engine:
        quantised = bits_per_byte(engine, tokenizer, documents)
    found = {"bytes": original.bytes, "hf": original.bits_per_byte, "q8_0": quantised.bits_per_byte}
    write_file(out / "bits-per-byte.json", json.dumps(found).encode())
    _say(f"original {original.bits_per_byte:.4f}, quantised {quantised.bits_per_byte:.4f} "
         f"({quantised.bits_per_byte / original.bits_per_byte - 1:+.2%}) on {original.bytes:,} bytes "
         f"that it has not seen; a byte taken at random costs 8")


def _generate(gguf: Path) -> None:
    """In a process of its own, so that the memory it tells is the runtime's alone."""
    command = ["generate", str(gguf), PROMPT, "--echo", "--max-tokens", "160", "--temperature", "0.7", "--seed", "0",
               "--stats"]
    _say("$ hybridlm " + " ".join(json.dumps(c) if " " in c else c for c in command) + "\n")
    subprocess.run([sys.executable, "-m", "hybridlm.cli", *command], check=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _fast_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 natively; without that it is slower than float32."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _title(line: str) -> None:
    width = shutil.get_terminal_size((100, 20)).columns
    _say(f"\n\033[1m{line}\033[0m" if sys.stderr.isatty() else f"\n== {line} "[:width])


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
