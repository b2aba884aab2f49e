"""A micro recipe, text for it, and processes that can be killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from tests.data.helpers import text

# Hidden 16, two layers: a step takes milliseconds.
MICRO = """
from hybridlm.config import FULL, LINEAR, HybridConfig, Rope
from hybridlm.train import Recipe

def recipe():
    model = HybridConfig(vocab_size=384, hidden_size=16, intermediate_size=32, layer_types=(LINEAR, FULL),
                         num_attention_heads=2, rope=Rope(1e4), tie_word_embeddings=True, max_position_embeddings=256)
    return Recipe(model=model, vocab=300, steps=24, batch=4, sequence=32, warmup=4, lr=1e-2, val_fraction=0.1,
                  save_every=4, val_every=8, val_tokens=500, tensorboard=False, threads=1)
"""

# Imports PyTorch once, then forks for each run: a fresh process in milliseconds instead of seconds.
NURSERY = """
import json, os, resource, sys
from hybridlm.train import __main__ as command
for line in sys.stdin:
    arguments, errors, limit = json.loads(line)
    child = os.fork()
    if child == 0:
        handle = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 2)
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        sys.argv = ["hybridlm.train", *arguments]
        try:
            command.main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
            print("" if isinstance(stop.code, int) else stop.code, file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            code = 130
        except BaseException:
            import traceback
            traceback.print_exc()
            code = 99
        os._exit(code)
    print(child, flush=True)
    status = os.waitpid(child, 0)[1]
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


class Nursery:
    """Runs `python -m hybridlm.train` in processes of their own."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen([sys.executable, "-c", NURSERY], stdin=subprocess.PIPE, env=environment,
                                        stdout=subprocess.PIPE, text=True)

    def run(self, recipe: str, *, kill_after: float | None = None, steps_first: int = 0, number: int = signal.SIGKILL,
            limit: int = 0, **settings: object) -> tuple[int, str]:
        """(exit code, stderr); a signal is sent after `kill_after` seconds, or once `steps_first` steps are told."""
        errors = Path(str(settings["out"])).with_suffix(".stderr")
        errors.unlink(missing_ok=True)
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps([[recipe, *(f"{k}={v}" for k, v in settings.items())], str(errors), limit]))
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        child = int(self.process.stdout.readline())
        if kill_after is not None:
            time.sleep(kill_after)
            kill(child, number)
        metrics = Path(str(settings["out"])) / "metrics.jsonl"
        while steps_first and alive(child):
            if metrics.exists() and metrics.read_bytes().count(b"\n") >= steps_first:
                kill(child, number)
                break
            time.sleep(0.001)
        code = int(self.process.stdout.readline())
        return code, errors.read_text() if errors.exists() else ""

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def kill(child: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(child, number)


def alive(child: int) -> bool:
    try:
        os.kill(child, 0)
    except ProcessLookupError:
        return False
    return True


def corpus(folder: Path, count: int = 40) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text(i, 40), "domain": "ab"[i % 2]}) + "\n" for i in range(count)))
    return file


def micro(folder: Path) -> str:
    file = folder / "micro.py"
    file.write_text(MICRO)
    return str(file)


def losses(out: Path) -> list[float]:
    """The loss of each step, in order; fails on a gap or a step told twice."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]
