"""The server under load: what many clients at once get from it, and whether each still gets its own.

    python -m benchmarks.serve_load models/hybridlm-tiny-q8_0.gguf --seconds 600 --clients 200

Starts `hybridlm serve` as a process of its own and plays clients against it: mixed lengths, half of the prompts with
one of a few common beginnings, a fifth cancelled at a random moment, one in fifty malformed. Then it checks

- that well-formed requests that were not cancelled completed, and that errors were the intended ones alone;
- that a sample of the greedy outputs is, to the last bit, what the same prompt gives alone in a fresh engine without a
  cache (cross-talk between streams would show here);
- that the server's memory stayed where it was after warming up;
- the 95th percentile of the time to the first token against ideal processor sharing: the same arrivals and prompt
  lengths on a simulated machine that all prompts waiting share equally, as fast as prompts were read in this run;
- how many tokens a second eight streams have together, against one.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

MALFORMED = (b"{", b'{"prompt": 3}', b'{"prompt": "x", "temperature": -1}', b'{"prompt": "\xff"}', b"[]",
             b'{"prompt": [1, 2, 999999999]}')


@dataclass
class Seen:
    """What became of one request."""

    kind: str  # "whole", "cancelled" or "malformed"
    prompt: list[int]
    sent: float
    status: int = 0
    first: float | None = None
    ended: float = 0.0
    text: str = ""
    tokens: int = 0
    read: int | None = None  # prompt tokens that were not reused
    finish: str | None = None
    error: str = ""


@dataclass
class Run:
    port: int
    vocab: int
    rng: random.Random
    seen: list[Seen] = field(default_factory=list)
    stop: bool = False


async def post(port: int, body: bytes, seen: Seen, cancel_after: float | None = None) -> None:
    """One streamed completion over a connection of its own."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
    try:
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
                     b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        if cancel_after is None:
            await answer(reader, seen)
        else:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(answer(reader, seen), cancel_after)
    finally:
        writer.close()
        seen.ended = time.monotonic()


async def answer(reader: asyncio.StreamReader, seen: Seen) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    seen.status = int(head.split(b" ", 2)[1])
    if seen.status != 200:
        seen.error = (await reader.read()).decode(errors="replace")
        return
    while line := await reader.readline():
        if not line.startswith(b"data: {"):
            continue
        chunk = json.loads(line[6:])
        if "error" in chunk:
            seen.error = str(chunk["error"])
            return
        choice = chunk["choices"][0]
        if choice["text"]:
            seen.text += choice["text"]
        if seen.first is None:
            seen.first = time.monotonic()
        if choice["finish_reason"]:
            seen.finish = choice["finish_reason"]
            seen.read, seen.tokens = chunk["timings"]["prompt_n"], chunk["timings"]["predicted_n"]


def request(prompt: list[int], tokens: int) -> bytes:
    return json.dumps({"prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True,
                       "ignore_eos": True}).encode()


async def client(run: Run, beginnings: list[list[int]], delay: float) -> None:
    rng = run.rng
    await asyncio.sleep(delay)
    while not run.stop:
        own = [rng.randrange(run.vocab) for _ in range(min(3000, int(rng.lognormvariate(5.0, 1.0)) + 8))]
        prompt = (rng.choice(beginnings) if rng.random() < 0.5 else []) + own
        chance = rng.random()
        kind = "malformed" if chance < 0.02 else "cancelled" if chance < 0.22 else "whole"
        body = rng.choice(MALFORMED) if kind == "malformed" else request(prompt, rng.choice((8, 16, 32, 64, 128)))
        seen = Seen(kind, prompt, time.monotonic())
        try:
            await post(run.port, body, seen, rng.expovariate(1 / 4) if kind == "cancelled" else None)
        except (OSError, asyncio.IncompleteReadError) as error:
            seen.error = repr(error)
        run.seen.append(seen)
        if kind == "malformed":
            await asyncio.sleep(0.05)


@dataclass
class Memory:
    """What a second of the server's life looked like."""

    seconds: float
    resident: int  # bytes of its own, files not counted
    cache: int  # bytes in the prefix cache
    budget: int
    running: int


async def watch(run: Run, pid: int, memory: list[Memory]) -> None:
    began = time.monotonic()
    while not run.stop:
        text = Path(f"/proc/{pid}/status").read_text()
        anonymous = re.search(r"RssAnon:\s+(\d+) kB", text)
        figures = await metrics(run.port)
        memory.append(Memory(time.monotonic() - began, int(anonymous[1]) * 1024 if anonymous else 0,
                             *(int(figures.get(f"hybridlm_{name}", 0))
                               for name in ("cache_bytes", "cache_budget_bytes", "requests_running"))))
        await asyncio.sleep(1)


async def metrics(port: int) -> dict[str, float]:
    """The gauges and counters of the server's only model, by name."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
    writer.write(b"GET /metrics HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
    text = (await reader.read()).decode(errors="replace")
    writer.close()
    return {name: float(value) for name, value in re.findall(r'^(\w+)\{model="m"\} (\S+)$', text, re.MULTILINE)}


def equal_sharing(jobs: list[tuple[float, float, float]], rate: float) -> list[float | None]:
    """When each (arrival, work, leaves at the latest) is done on a machine of this rate that all share equally; None
    for those that left before."""
    done: list[float | None] = [None] * len(jobs)
    order = sorted(range(len(jobs)), key=lambda i: jobs[i][0])
    left: dict[int, float] = {}
    now, at = 0.0, 0
    while at < len(order) or left:
        if not left:
            now = max(now, jobs[order[at]][0])
        share = rate / max(1, len(left))
        events = [now + min(left.values()) / share, min(jobs[i][2] for i in left)] if left else []
        if at < len(order):
            events.append(jobs[order[at]][0])
        then = max(now, min(events))
        for i in left:
            left[i] -= (then - now) * share
        now = then
        for i in [i for i, work in left.items() if work <= 1e-6]:
            done[i] = now
            del left[i]
        for i in [i for i in left if jobs[i][2] <= now]:
            del left[i]
        while at < len(order) and jobs[order[at]][0] <= now:
            left[order[at]] = max(1.0, jobs[order[at]][1])
            at += 1
    return done


def first_tokens(seen: list[Seen]) -> dict[str, float]:
    """Times to the first token, measured and under ideal sharing."""
    jobs, real = [], []
    for s in seen:
        if s.kind == "malformed" or s.status not in (0, 200):
            continue
        work = s.read if s.read is not None else len(s.prompt)
        left = s.ended if s.kind == "cancelled" and s.first is None else float("inf")
        jobs.append((s.sent, float(work), left))
        real.append(s.first)
    # Rows read, over the time in which at least one prompt waited.
    spans = sorted((s.sent, s.first or s.ended) for s in seen if s.kind != "malformed")
    busy, until = 0.0, 0.0
    for a, b in spans:
        busy += max(0.0, b - max(a, until))
        until = max(until, b)
    rate = sum(w for (_, w, _), first in zip(jobs, real, strict=True) if first is not None) / busy
    ideal = equal_sharing(jobs, rate)
    pairs = [(first - job[0], there - job[0]) for job, first, there in zip(jobs, real, ideal, strict=True)
             if first is not None and there is not None]
    mine, theirs = sorted(a for a, _ in pairs), sorted(b for _, b in pairs)
    at = int(0.95 * len(pairs))
    return {"prefill_tokens_per_s": rate, "p50_s": statistics.median(mine), "p50_ideal_s": statistics.median(theirs),
            "p95_s": mine[at], "p95_ideal_s": theirs[at], "p95_ratio": mine[at] / theirs[at]}


def drift(memory: list[Memory], least: float) -> dict[str, float]:
    """How memory changed between the first and the last fifth of the time after warming up, which is over when the
    prefix cache has filled its budget, but not before `least` seconds."""
    full = next((m.seconds for m in memory if m.cache >= 0.9 * m.budget), memory[-1].seconds / 2)
    warm = max(full, least)
    later = [m for m in memory if m.seconds >= warm]
    fifth = max(1, len(later) // 5)
    first, last = (statistics.mean(m.resident for m in part) for part in (later[:fifth], later[-fifth:]))
    return {"cache_full_after_s": full, "warm_after_s": warm, "memory_first_fifth_mb": first / 1e6,
            "memory_last_fifth_mb": last / 1e6, "memory_drift": last / first - 1}


def alone(model: str, seen: list[Seen], context: int) -> int:
    """How many of these outputs differ from what each prompt gives by itself."""
    from hybridlm.engine import Engine

    wrong = 0
    with Engine.open(model, cache_bytes=0, context=context) as engine:
        for s in seen:
            generation = engine.generate(s.prompt, max_tokens=s.tokens, temperature=0, ignore_eos=True)
            for _ in generation:
                pass
            wrong += generation.text != s.text
    return wrong


async def load(run: Run, pid: int, args: argparse.Namespace) -> dict[str, Any]:
    beginnings = [[run.rng.randrange(run.vocab) for _ in range(n)] for n in (100, 300, 600, 600, 1100, 1500)]
    memory: list[Memory] = []
    watcher = asyncio.create_task(watch(run, pid, memory))
    clients = [asyncio.create_task(client(run, beginnings, run.rng.uniform(0, 2))) for _ in range(args.clients)]
    began = time.monotonic()
    await asyncio.sleep(args.seconds)
    run.stop = True
    await asyncio.gather(*clients, watcher)
    seconds = time.monotonic() - began
    by = {k: [s for s in run.seen if s.kind == k] for k in ("whole", "cancelled", "malformed")}
    done = [s for s in by["whole"] if s.finish]
    odd = [s for s in run.seen if (s.kind != "malformed" and (s.error or s.status not in (0, 200)))
           or (s.kind == "malformed" and s.status != 400)]
    result: dict[str, Any] = {
        "seconds": seconds, "requests": len(run.seen), "whole": len(by["whole"]), "completed": len(done),
        "completed_share": len(done) / max(1, len(by["whole"])), "cancelled": len(by["cancelled"]),
        "malformed": len(by["malformed"]), "unintended_errors": len(odd), "errors": [s.error for s in odd[:3]],
        "generated_tokens_per_s": sum(s.tokens for s in done) / seconds,
        "memory_peak_mb": max(m.resident for m in memory) / 1e6, **drift(memory, min(args.warm, args.seconds / 3)),
        **first_tokens(run.seen)}
    if args.trace:
        args.trace.write_text("".join(json.dumps(asdict(m)) + "\n" for m in memory))
    result["checked_alone"] = min(args.check, len(done))
    return result


async def streams(port: int, vocab: int, rounds: int) -> dict[str, float]:
    """Tokens a second of one stream, and of eight together, in turns."""
    rng = random.Random(1)

    async def together(n: int) -> float:
        seen = [Seen("whole", [rng.randrange(vocab) for _ in range(16)], 0.0) for _ in range(n)]
        await asyncio.gather(*(post(port, request(s.prompt, 256), s) for s in seen))
        first, last = min(s.first or 0 for s in seen), max(s.ended for s in seen)
        return sum(s.tokens for s in seen) / (last - first)

    await together(8)
    one, eight = [], []
    for _ in range(rounds):
        one.append(await together(1))
        eight.append(await together(8))
    return {"one_stream_tokens_per_s": statistics.median(one), "eight_streams_tokens_per_s": statistics.median(eight),
            "eight_over_one": statistics.median(eight) / statistics.median(one)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--warm", type=float, default=120, help="seconds before memory is compared")
    parser.add_argument("--check", type=int, default=200, help="outputs compared with each prompt alone")
    parser.add_argument("--rounds", type=int, default=5, help="of one stream against eight")
    parser.add_argument("--cache", default="256MB")
    parser.add_argument("--trace", type=Path, help="memory second by second, as JSON lines")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    command = [sys.executable, "-m", "hybridlm.cli", "serve", f"m={args.model}", "--port", "0", "--cache", args.cache,
               "--log", "json"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            line = server.stderr.readline()
            port = int(line.split(":")[-1].split()[0].split("/")[0])
            log = subprocess.Popen([sys.executable, "-c", "import sys\nfor _ in sys.stdin: pass"], stdin=server.stderr)
            result = measure(port, server.pid, args)
        finally:
            server.terminate()
            server.wait(60)
            log.wait(10)
    seen = result.pop("seen")
    sample = random.Random(2).sample(seen, min(args.check, len(seen)))
    result["differ_from_alone"] = alone(args.model, sample, result.pop("context"))
    for key, value in result.items():
        print(f"{key:>28}  {value:.4g}" if isinstance(value, float) else f"{key:>28}  {value}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


def measure(port: int, pid: int, args: argparse.Namespace) -> dict[str, Any]:
    from urllib.request import urlopen

    for _ in range(600):
        with contextlib.suppress(OSError):
            urlopen(f"http://127.0.0.1:{port}/ready").read()
            break
        time.sleep(0.05)
    card = json.load(urlopen(f"http://127.0.0.1:{port}/v1/models"))["data"][0]
    run = Run(port, 10_000, random.Random(0))
    result = asyncio.run(streams(port, run.vocab, args.rounds)) if args.rounds else {}
    if args.seconds:
        result |= asyncio.run(load(run, pid, args))
    result["seen"] = [s for s in run.seen if s.kind == "whole" and s.finish]
    result["context"] = card["context_length"]
    return result


if __name__ == "__main__":
    main()
