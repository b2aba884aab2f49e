"""What a user of the 7B on a CPU meets, figure by figure: depth, memory, second turns, guesses, streams, start.

    python -m benchmarks.cpu_scenarios depth --type q4_0            # decode at 0, 8k and 32k tokens, peak memory
    python -m benchmarks.cpu_scenarios parts                        # where the time of a prompt goes
    python -m benchmarks.cpu_scenarios turn                         # second turn of a chat, saving and restoring
    python -m benchmarks.cpu_scenarios lookup --model M --old OLD --new NEW --prose TEXT
    python -m benchmarks.cpu_scenarios small --model M --prose TEXT # a trained model: 8 streams, cold start, accuracy

`lookup` replays a recorded edit: the prompt is a file as it was, the text to be written the file as it became, and a
sampler that always chooses what was recorded stands for the model; every pass, check and rollback is done. M is a GGUF
file with a tokenizer. Deep contexts are made by filling the pages of a state with noise: what takes hours to read takes
as long to look back at as real text does.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from hybridlm import HybridConfig, native
from hybridlm.cli._common import peak_rss_bytes
from hybridlm.engine import Engine, Sampler
from hybridlm.engine.cpu import CPU
from hybridlm.engine.speculative import speculate

PROBE_BYTES = 4 << 30


def seven(o: argparse.Namespace, context: int, **options: Any) -> Engine:
    return Engine.random(HybridConfig.preset(o.preset), o.type, kv_type="q8_0", context=context, **options)


def timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def ids(engine: Engine, count: int, seed: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(0, engine.config.vocab_size, count)]


def deep(engine: Engine, tokens: int) -> Any:
    """A session that stands after `tokens` tokens, its keys and values noise."""
    session, noise = engine.session(), np.random.default_rng(0).integers(1, 60, 1 << 20, dtype=np.uint8)
    session.prefill(ids(engine, 16))
    state = session.state
    state.reserve(tokens - state.position)
    for group in state.groups:
        for page in group.pages:
            flat = page.reshape(-1)
            for at in range(0, len(flat), len(noise)):
                flat[at:at + len(noise)] = noise[:len(flat) - at]
    state.tokens += ids(engine, tokens - state.position)
    return session


def depth(o: argparse.Namespace) -> dict[str, Any]:
    depths = [0, 8192, 32_768]
    engine = seven(o, depths[-1] + 64, cache_bytes=0)
    result: dict[str, Any] = {"model_bytes": engine.model_bytes}
    sessions = {d: deep(engine, max(d, 17)) for d in depths}
    sessions[depths[-1]].prefill(ids(engine, 32))  # buffers of a long pass, at full depth
    result["kv_bytes_32k"] = sum(p.nbytes for g in sessions[depths[-1]].state.groups for p in g.pages)
    other = sum(p.nbytes for d in depths[:-1] for g in sessions[d].state.groups for p in g.pages)
    result["peak_bytes"] = peak_rss_bytes() - other - 2 * engine.layout.fixed_bytes  # of one 32k text alone
    result["beyond_file_and_kv"] = result["peak_bytes"] - result["model_bytes"] - result["kv_bytes_32k"]
    probe, reads = np.ones(PROBE_BYTES, np.uint8), []
    steps: dict[int, list[float]] = {d: [] for d in depths}
    for _ in range(o.rounds):
        reads += [native.read_bandwidth(probe) for _ in range(2)]
        for d, session in sessions.items():
            steps[d] += [timed(functools.partial(session.step, 1)) for _ in range(4)]
    result["read_bytes_per_s"] = max(reads)
    for d, times in steps.items():
        moved = engine.decode_bytes_per_token(max(d, 17))
        result[f"decode_{d}"] = {"tokens_per_s": 1 / median(times), "bytes": moved,
                                 "share": moved / median(times) / max(reads)}
    return result


def parts(o: argparse.Namespace) -> dict[str, Any]:
    spent: dict[str, float] = {}

    def clocked(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            began = time.perf_counter()
            try:
                return work(*args)
            finally:
                spent[name] = spent.get(name, 0.0) + time.perf_counter() - began
        return run

    names = ("begin", "embed", "norm", "linear", "swiglu", "add", "rope", "gdn", "attention", "head")
    for name in names:
        setattr(CPU, name, clocked(name, getattr(CPU, name)))
    engine = seven(o, o.prompt + 1, cache_bytes=0)
    tokens, result = ids(engine, o.prompt), {}
    for isa in dict.fromkeys(i for i in ("avx512", native.isa()) if i in native.available()):
        native.set_isa(isa)
        engine.session().prefill(tokens[:64])
        shares, speeds = [], []
        for _ in range(o.rounds):
            spent.clear()
            seconds = timed(lambda: engine.session().prefill(tokens))
            speeds.append(o.prompt / seconds)
            shares.append({k: v / seconds for k, v in spent.items()})
        result[isa] = {"tokens_per_s": median(speeds)} | {k: round(median(s[k] for s in shares), 4) for k in shares[0]}
    return result


def turn(o: argparse.Namespace) -> dict[str, Any]:
    engine = seven(o, 4200, cache_bytes=4 << 30)
    first, more = ids(engine, 4000), ids(engine, 64, 1)
    result: dict[str, Any] = {"prefill_4000_s": timed(lambda: next(engine.generate(first, max_tokens=1)))}
    result["prefill_tokens_per_s"] = 4000 / result["prefill_4000_s"]
    generations = []

    def second() -> None:
        generations.append(engine.generate([*first, *more], max_tokens=1))
        next(generations[0])

    result["second_turn_s"] = timed(second)
    result["reused"] = generations[0].reused_tokens
    engine.cache.clear()
    result["without_cache_s"] = timed(lambda: next(engine.generate([*first, *more], max_tokens=1)))
    result["ratio"] = result["without_cache_s"] / result["second_turn_s"]
    session, _ = engine.resume([*first, *more])
    result["save_s"] = timed(lambda: session.save(o.work / "turn.state"))
    other = engine.session()
    result["load_s"] = timed(lambda: other.load(o.work / "turn.state"))
    result["saved_bytes"] = (o.work / "turn.state").stat().st_size
    result["exact"] = bool(np.array_equal(session.step(7), other.step(7)))
    (o.work / "turn.state").unlink()
    return result


class Replay(Sampler):
    """Chooses what was recorded, whatever the logits say."""

    def __init__(self, text: list[int], prompt: int) -> None:
        super().__init__(0)
        self.text, self.prompt = text, prompt

    def sample(self, logits: np.ndarray, seen: Iterable[int] = (), **_: Any) -> int:
        super().sample(logits)  # as much work as ever
        return self.text[sum(1 for _ in seen) - self.prompt]


def lookup(o: argparse.Namespace) -> dict[str, Any]:
    with Engine.open(o.model) as small:
        encode = small.tokenizer.encode
        old, new, prose = (encode(Path(p).read_text()) for p in (o.old, o.new, o.prose))
    engine = seven(o, 8192, cache_bytes=0)
    differs = next(i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b)
    start = max(0, differs - o.tokens // 4)  # a quarter before the first change
    cases = {"edit": (old[max(0, start - 200):start + 1300], new[start:start + o.tokens]),
             "prose": (prose[:300], prose[300:300 + o.tokens])}
    result: dict[str, Any] = {}
    for name, (prompt, target) in cases.items():
        prompt = [t % engine.config.vocab_size for t in prompt]
        target = [t % engine.config.vocab_size for t in target] + [0] * 16
        base = engine.session()
        base.feed(prompt)
        start_state = base.snapshot()
        speeds: dict[str, list[float]] = {"plain": [], "guessing": []}
        for how in list(speeds) * o.rounds:
            base.restore(start_state)
            base.logits()
            sampler, began = Replay(target, len(prompt)), time.perf_counter()
            if how == "plain":
                seen = list(prompt)
                for _ in range(o.tokens):
                    seen.append(sampler.sample(base.logits(), seen))
                    base.feed(seen[-1:])
            else:
                got = list(itertools.islice(speculate(base, sampler, prompt, most=o.tokens + 8), o.tokens + 1))
                assert got[:o.tokens] == target[:o.tokens]
            speeds[how].append(o.tokens / (time.perf_counter() - began))
        result[name] = {k: median(v) for k, v in speeds.items()}
        result[name]["ratio"] = result[name]["guessing"] / result[name]["plain"]
    return result


def small(o: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {}
    text = Path(o.prose).read_text()
    with Engine.open(o.model, cache_bytes=0) as engine, Engine.open(o.model, cache_bytes=0, exact=True) as exact:
        tokens = engine.tokenizer.encode(text)[:1500]
        for isa in dict.fromkeys(i for i in ("avx512", native.isa()) if i in native.available()):
            native.set_isa(isa)
            p, q = exact.logits(tokens).astype(np.float64), engine.logits(tokens).astype(np.float64)
            p -= np.log(np.exp(p - p.max(-1, keepdims=True)).sum(-1, keepdims=True)) + p.max(-1, keepdims=True)
            q -= np.log(np.exp(q - q.max(-1, keepdims=True)).sum(-1, keepdims=True)) + q.max(-1, keepdims=True)
            result[f"kl_{isa}"] = float((np.exp(p) * (p - q)).sum(-1).mean())
        sessions = [engine.session() for _ in range(8)]
        for i, session in enumerate(sessions):
            session.feed(tokens[40 * i:40 * i + 60])
        one: list[float] = []
        eight: list[float] = []
        for _ in range(60):
            one.append(timed(lambda: engine.step([(sessions[0], [5])])))
            eight.append(timed(lambda: engine.step([(s, [5]) for s in sessions])))
        result["streams"] = {"one": 1 / median(one), "eight": 8 / median(eight)}
        result["streams"]["ratio"] = 8 * median(one) / median(eight)
        for i in range(8):  # greedy with guesses and without
            prompt, outputs = tokens[50 * i:50 * i + 120], []
            for guess in (False, True):
                generation = engine.generate(prompt, max_tokens=60, temperature=0, speculative=guess)
                list(generation)
                outputs.append(generation.tokens)
            result["identical"] = result.get("identical", True) and outputs[0] == outputs[1]
    prompt = " ".join(text.split()[:10])
    command = [str(Path(sys.executable).parent / "hybridlm"), "generate", str(o.model), prompt, "--max-tokens", "1"]
    result["cold_start_s"] = median(timed(lambda: subprocess.run(command, check=True, capture_output=True))
                                    for _ in range(7))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["depth", "parts", "turn", "lookup", "small"])
    parser.add_argument("--preset", default="7b")
    parser.add_argument("--type", default="q4_0")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=96, help="to be written by `lookup`")
    parser.add_argument("--model", type=Path, help="a trained model with a tokenizer")
    parser.add_argument("--old", help="a file before an edit")
    parser.add_argument("--new", help="and after it")
    parser.add_argument("--prose", help="a text that does not repeat itself")
    parser.add_argument("--work", type=Path, default=Path(), help="a folder for files of a moment")
    o = parser.parse_args()
    result = globals()[o.what](o)
    for key, value in result.items():
        print(f"{key:24} {value}")
    print(json.dumps({"what": o.what, "preset": o.preset, "type": o.type, "isa": native.isa(), **result}, default=str))


if __name__ == "__main__":
    main()
