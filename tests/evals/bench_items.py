"""Benchmark files that the tests make themselves: nonsense with the shape of the real ones."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
from tests.data.helpers import WORDS


def phrase(rng, low=1, high=5) -> str:
    return " ".join(WORDS[i] for i in rng.integers(0, len(WORDS), int(rng.integers(low, high))))


def choices(rng, count) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[phrase(rng)] = None
    return list(found)


def rows(name: str, count: int, seed: int = 0) -> list[dict]:
    """Items for a file of `tasks.TASKS`."""
    rng = np.random.default_rng([seed, len(name)])
    found = []
    for i in range(count):
        row = {"id": f"{name}-{i}", "question": phrase(rng, 4, 12) + "?"}
        if name.startswith("mmlu"):
            row |= {"choices": choices(rng, 4), "answer": int(rng.integers(4)),
                    "subject": ("reading_streams", "matrix_keeping")[i % 2]}
        elif name.startswith("winogrande"):
            row["question"] = f"{phrase(rng, 3, 6)} _ {phrase(rng, 3, 6)}."
            row |= {"choices": choices(rng, 2), "answer": int(rng.integers(2))}
        elif name.startswith(("lambada", "gsm8k", "squad")):
            row |= {"context": phrase(rng, 10, 30), "target": phrase(rng, 1, 2)}
            if name.startswith("gsm8k"):
                row |= {"target": str(i), "solution": f"{i} = <<{i}={i}>>{i} {phrase(rng)}"}
        elif name.startswith("humaneval"):
            row |= {"context": f"def f{i}(x):\n    \"\"\"Adds {i}.\"\"\"\n", "target": f"    return x + {i}\n",
                    "test": f"def check(f):\n    assert f(1) == {1 + i}\n", "entry_point": f"f{i}"}
        elif name.startswith("mbpp"):
            row |= {"target": f"def f(x):\n    return x + {i}", "test_list": [f"assert f(1) == {1 + i}"]}
        else:
            count_ = 2 if name.startswith(("boolq", "piqa")) else int(rng.integers(3, 6))
            row |= {"context": phrase(rng, 8, 20), "choices": choices(rng, count_), "answer": int(rng.integers(count_))}
        found.append(row)
    return found


def write(folder: Path, name: str, count: int, seed: int = 0) -> list[dict]:
    """The items, written as .jsonl or, for every second name, .jsonl.gz."""
    folder.mkdir(parents=True, exist_ok=True)
    made = rows(name, count, seed)
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made).encode()
    if len(name) % 2:
        (folder / f"{name}.jsonl").write_bytes(data)
    else:
        (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(data))
    return made
