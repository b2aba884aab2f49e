"""Damage, by the thousand: random edits of valid files, at the bytes and inside their JSON."""

from __future__ import annotations

import json
import random
from typing import Any

ODD_NUMBERS = [0, 1, 2, 3, 7, 31, 33, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**62,
               2**63 - 1, 2**63, 2**64 - 1, 2**64 - 8]
ODD_VALUES: list[Any] = [None, True, False, -1, 0, 1, 2.5, -0.0, 1e308, 10**30, 2**63, 2**64, "", "a", "F32", "BF16",
                         "\ud800", "x" * 300, [], [[]], [None], [0], [-1, 5], [0, 2**62], [2**61, 2**61], {}, {"a": 1},
                         {"dtype": "F32"}, float("nan"), float("inf")]


def mutate_bytes(rng: random.Random, data: bytes, header: int) -> bytes:
    """One to three edits, most of them in the first `header` bytes."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if not out:
            break
        at = rng.randrange(min(len(out), header) if rng.random() < 0.95 else len(out))
        kind = rng.randrange(9)
        if kind == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at] = rng.randrange(256)
        elif kind == 2:
            width = rng.choice([4, 8])
            out[at : at + width] = (rng.choice(ODD_NUMBERS) % (1 << 8 * width)).to_bytes(width, "little")
        elif kind == 3:
            width = rng.choice([4, 8])
            value = int.from_bytes(out[at : at + width], "little") + rng.choice([-9, -8, -1, 1, 8, 9, 1 << 16])
            out[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, "little")
        elif kind == 4:
            del out[at:]
        elif kind == 5:
            del out[at : at + rng.choice([1, 4, 8, 32])]
        elif kind == 6:
            out[at:at] = rng.randbytes(rng.choice([1, 4, 8, 32]))
        elif kind == 7:
            other = rng.randrange(min(len(out), header))
            size = rng.choice([4, 8, 24, 60])
            out[at : at + size] = out[other : other + size]
        else:
            out += rng.randbytes(rng.choice([1, 64, 4096]))
    return bytes(out)


def mutate_json(rng: random.Random, text: str) -> str:
    """One to three edits of the values and names in a JSON text."""
    value = json.loads(text)
    for _ in range(rng.choice([1, 1, 2, 3])):
        value = _edit(rng, value)
    try:
        return json.dumps(value)
    except ValueError:
        return "{}"


def _edit(rng: random.Random, value: Any) -> Any:
    """Change something at or below this value."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        action = rng.randrange(8)
        if action == 0:
            return {k: v for k, v in value.items() if k != key}
        if action == 1:
            return {**{k: v for k, v in value.items() if k != key}, str(rng.choice(ODD_VALUES))[:400]: value[key]}
        if action == 2:
            return {**value, key: value[rng.choice(list(value))]}
        return {**value, key: _edit(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.8:
        i = rng.randrange(len(value))
        action = rng.randrange(4)
        if action == 0:
            return value[:i] + value[i + 1 :]
        if action == 1:
            return [*value, value[i]]
        return [*value[:i], _edit(rng, value[i]), *value[i + 1 :]]
    if isinstance(value, int) and rng.random() < 0.5:
        return value + rng.choice([-8, -4, -1, 1, 4, 8, 2**32, 2**63])
    return rng.choice([*ODD_VALUES, *ODD_NUMBERS])
