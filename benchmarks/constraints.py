"""What a constraint costs a token: the same model writing freely and under a JSON schema, in turns.

    python -m benchmarks.constraints models/hybridlm-tiny-q8_0.gguf
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

from hybridlm.engine import Engine, Sampler
from hybridlm.engine.writer import Writer
from hybridlm.server.constraint import Grammar

SCHEMA = {"type": "object", "required": ["tags"], "additionalProperties": False, "properties": {
    "tags": {"type": "array", "items": {"type": "string"}, "minItems": 40, "maxItems": 60}}}


def milliseconds(engine: Engine, grammar: Grammar | None, temperature: float, tokens: int) -> float:
    """A token, sampling and mask included, the grammar's compilation and the prompt not."""
    matcher = grammar.matcher("json_schema", SCHEMA) if grammar else None
    writer = Writer(engine, engine.encode("A list of things:"), Sampler(temperature, seed=1), max_tokens=tokens,
                    constraint=matcher)
    session = writer.begin()
    while ids := writer.slice():
        session.feed(ids)
    began = time.perf_counter()
    while (piece := writer.write(session.logits())).finish is None and piece.token is not None:
        session.feed([piece.token])
    return 1e3 * (time.perf_counter() - began) / len(writer.tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=120)
    args = parser.parse_args()
    results = []
    with Engine.open(args.model, cache_bytes=0) as engine:
        grammar = Grammar(engine, engine.eos)
        for temperature in (0.0, 1.0):
            free, bound = [], []
            for _ in range(args.rounds):
                free.append(milliseconds(engine, None, temperature, args.tokens))
                bound.append(milliseconds(engine, grammar, temperature, args.tokens))
            a, b = statistics.median(free), statistics.median(bound)
            results.append({"temperature": temperature, "free_ms": a, "constrained_ms": b, "overhead": b / a - 1})
            print(f"temperature {temperature}: {a:.3f} ms free, {b:.3f} ms constrained, {b / a - 1:+.1%}")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
