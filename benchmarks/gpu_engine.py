"""The GPU engine at the 7B's shape with random bfloat16 weights: decoding, prefill, memory, beside floors and peers.

    python benchmarks/gpu_engine.py [--preset 7b] [--json out.json]
        [--sections decode,batch,prefill,agreement,invariant,peer]

Floors: bytes that must move (weights but the input table, recurrent states read and written, keys and values read) over
the bandwidth that a copy reaches on this device, measured in the same run. Speed does not depend on the numbers, so the
32 streams' memories are taken as zeros instead of being read from text. Medians.

The peer is transformers' OlmoHybridForCausalLM of the same shape, with flash-linear-attention where it is importable.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hybridlm import Engine, HybridConfig

FLOPS = 989e12  # of an H100 or H200, bfloat16, dense


def bandwidth() -> float:
    """Bytes a second of adding to a gigabyte in place."""
    x = torch.zeros(1 << 28, device="cuda")
    return 2 * x.nbytes / timed(lambda: x.add_(1.0), 5)


def timed(call: Any, repeat: int) -> float:
    """Median seconds of a call, to the end of its work on the device."""
    call()
    times = []
    for _ in range(repeat):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def streams(engine: Engine, count: int, context: int) -> list[Any]:
    """Sessions that have `context` tokens behind them, their memories zero."""
    sessions = [engine.session() for _ in range(count)]
    for s in sessions:
        s.state.reserve(context)
        s.state.tokens = [0] * context
    return sessions


def decoding(engine: Engine, count: int, context: int, rate: float, steps: int = 40) -> dict[str, Any]:
    """Greedy steps of `count` streams: with logits in main memory and a choice from them, and the passes alone."""
    sessions = streams(engine, count, context)
    tokens = [1] * count

    def step() -> None:
        nonlocal tokens
        rows = engine.step([(s, [t]) for s, t in zip(sessions, tokens, strict=True)])
        tokens = [int(t) for t in rows.argmax(axis=-1)]

    for _ in range(3):
        step()
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    whole = statistics.median(times)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(steps):
        engine.feed([(s, [1]) for s in sessions])
    torch.cuda.synchronize()
    alone = (time.perf_counter() - began) / steps
    weights = engine.decode_bytes_per_token() - 2 * (engine.layout.fixed_bytes - 4 * engine.layout.hidden) \
        - engine.layout.kv_bytes_read(0)
    per = engine.decode_bytes_per_token(context) - weights
    floor = (weights + count * per) / rate
    return {"streams": count, "context": context, "step_ms": 1e3 * whole, "tokens_per_s": count / whole,
            "pass_ms": 1e3 * alone, "floor_ms": 1e3 * floor, "of_floor": floor / whole}


def generation(engine: Engine) -> dict[str, Any]:
    """One stream through `Engine.generate`, as a user has it."""
    rates = []
    for _ in range(2):
        g = engine.generate([1, 2, 3, 4], max_tokens=128, temperature=0, ignore_eos=True)
        for _ in g:
            pass
        rates.append(g.decode_tokens_per_s)
    return {"generate_tokens_per_s": max(rates)}


def prefill(engine: Engine, lengths: list[int], repeat: int = 3) -> dict[str, Any]:
    """Read so many tokens from nothing, logits of the last one only."""
    found = {}
    rng = np.random.default_rng(0)
    for n in lengths:
        tokens = rng.integers(0, engine.config.vocab_size, n).astype(np.int32)
        torch.cuda.reset_peak_memory_stats()
        found[str(n)] = {"ms": 1e3 * timed(lambda t=tokens: engine.session().prefill(t), repeat),
                         "peak_gb": torch.cuda.max_memory_allocated() / 1e9}
    return found


def invariance(engine: Engine, fixed: Engine, rate: float) -> dict[str, Any]:
    """Logits of a text alone and among 31 others, in every bit; and what that costs."""
    rng = np.random.default_rng(1)
    texts = [rng.integers(0, engine.config.vocab_size, int(n)).tolist() for n in rng.integers(3, 90, 32)]
    result = {}
    for name, e in (("usual", engine), ("invariant", fixed)):
        alone, among = [], []
        s = e.session()
        alone.append(s.prefill(texts[5]))
        for t in range(8):
            alone.append(s.step(t + 7))
        sessions = [e.session() for _ in texts]
        among.append(e.step(list(zip(sessions, texts, strict=True)))[5])
        for t in range(8):
            among.append(e.step([(x, [t + 7]) for x in sessions])[5])
        same = [bool(np.array_equal(a, b)) for a, b in zip(alone, among, strict=True)]
        result[name] = {"prefill_same": same[0], "steps_same": sum(same[1:]), "steps": len(same) - 1,
                        **{f"streams_{n}": decoding(e, n, 1024, rate, 20)["tokens_per_s"] for n in (1, 32)},
                        "prefill_2048_ms": prefill(e, [2048])["2048"]["ms"]}
    return result


def agreement(make: Any, tokens: np.ndarray, lengths: list[int], steps: int = 256) -> dict[str, Any]:
    """Mean KL(float32 || path), nats, over the last `steps` tokens of texts of these lengths: what precedes them
    is read as a prompt, they token by token. Paths: PyTorch's operations in bfloat16 without recording ("eager"), the
    kernels without recording, and recorded; one stream, and beside seven others."""
    from hybridlm.evals.agreement import divergences

    exact = make(exact=True)
    paths = {"eager": make(ops={"kernels": False, "graphs": False}), "kernels": make(ops={"graphs": False}),
             "graphed": make()}
    found: dict[str, Any] = {}
    for n in lengths:
        reference = exact.session()
        head = tokens[:n - steps]
        if len(head):
            reference.feed(head)
        rows = exact.step([(reference, tokens[len(head):n])], every=True)
        found[str(n)] = {}
        for name, engine in paths.items():
            for company in (0, 7) if name == "graphed" else (0,):
                sessions = [engine.session() for _ in range(1 + company)]
                if len(head):
                    engine.feed([(s, head if i == 0 else tokens[i:i + 20]) for i, s in enumerate(sessions)])
                got = np.stack([engine.step([(s, [t]) for s in sessions])[0] for t in tokens[len(head):n].tolist()])
                kl, margin = divergences(rows, got)
                same = (rows.argmax(1) == got.argmax(1))[margin > 0.1]
                found[str(n)][name + (" among 8" if company else "")] = {
                    "mean_kl": float(kl.mean()), "max_kl": float(kl.max()), "top1": float(same.mean())}
        eager = found[str(n)]["eager"]["mean_kl"]
        found[str(n)]["graphed_of_eager"] = found[str(n)]["graphed"]["mean_kl"] / eager
    return found


def peer(config: HybridConfig, lengths: list[int]) -> dict[str, Any]:
    """transformers, made on the device without initialisation."""
    import tempfile

    import transformers
    from transformers import AutoConfig, OlmoHybridForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        theirs = AutoConfig.from_pretrained(folder)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"), transformers.initialization.no_init_weights():
        model = OlmoHybridForCausalLM(theirs).eval()
    torch.set_default_dtype(torch.float32)
    for p in model.parameters():
        p.data.normal_(0, 0.02) if p.ndim > 1 else p.data.fill_(0.5)
    found: dict[str, Any] = {"transformers": transformers.__version__}
    try:
        import fla

        found["fla"] = fla.__version__
    except ImportError:
        found["fla"] = None
    with torch.inference_mode():
        ids = torch.randint(0, config.vocab_size, (1, max(lengths)), device="cuda")
        out = model(ids[:, :16], use_cache=True, logits_to_keep=1)
        cache, token = out.past_key_values, ids[:, :1]

        def step() -> None:
            nonlocal token
            token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)

        found["step_ms"] = 1e3 * timed(step, 10)
        found["tokens_per_s"] = 1e3 / found["step_ms"]
        for n in lengths:
            found[f"prefill_{n}_ms"] = 1e3 * timed(lambda n=n: model(ids[:, :n], use_cache=True, logits_to_keep=1), 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="7b")
    parser.add_argument("--sections", default="decode,batch,prefill,agreement,invariant,peer")
    parser.add_argument("--lengths", default="2048,65536", help="tokens of the prefills")
    parser.add_argument("--model", default="", help="a GGUF file for the section agreement, beside random weights")
    parser.add_argument("--tokens", default="", help="token ids (.npy) that this model reads; random ones if left out")
    parser.add_argument("--layers", type=int, default=0, help="only so many layers, for a trial")
    parser.add_argument("--json", default="")
    options = parser.parse_args()
    sections, lengths = options.sections.split(","), [int(n) for n in options.lengths.split(",")]
    config = HybridConfig.preset(options.preset).with_(max_position_embeddings=1 << 17)
    if options.layers:
        config = config.with_(layer_types=config.layer_types[:options.layers])
    rate = bandwidth()
    result: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__,
                              "preset": options.preset, "bandwidth_tb_s": rate / 1e12}
    print(json.dumps(result), flush=True)
    began = time.perf_counter()
    needed = {"decode", "batch", "prefill", "invariant"} & set(sections)
    engine: Any = Engine.random(config if needed else HybridConfig.preset("tiny"), device="cuda", cache_bytes=0)
    result["load_s"] = time.perf_counter() - began
    result["weights_gb"] = torch.cuda.memory_allocated() / 1e9

    def section(name: str, call: Any) -> None:
        if name.split("_")[0] not in sections:
            return
        try:
            result[name] = call()
        except Exception as error:  # the other sections still count
            result[name] = {"error": f"{type(error).__name__}: {error}"[:500]}
        print(name, json.dumps(result[name]), flush=True)

    section("decode", lambda: decoding(engine, 1, 512, rate) | generation(engine))
    section("batch_32x8k", lambda: decoding(engine, 32, 8192, rate, 20))
    section("batch_8x1k", lambda: decoding(engine, 8, 1024, rate, 20))
    section("batch_64x1k", lambda: decoding(engine, 64, 1024, rate, 20))
    section("prefill", lambda: prefill(engine, lengths))
    if "agreement" in sections:
        from hybridlm.engine.cuda_open import open_engine, random_engine

        small, ids = HybridConfig.preset("190m"), np.random.default_rng(2).integers(0, 100_000, 16_384)
        section("agreement_random_190m", lambda: agreement(
            lambda **o: random_engine(Engine, small, cache_bytes=0, context=1 << 15, **o), ids, [256, 4096, 16_384]))
        if options.model:
            first = open_engine(Engine, options.model, cache_bytes=0)
            text = np.load(options.tokens) if options.tokens else np.random.default_rng(3).integers(
                0, first.config.vocab_size, 16_384)
            section("agreement_model", lambda: agreement(
                lambda **o: open_engine(Engine, options.model, cache_bytes=0, context=1 << 15, **o), text,
                [256, 4096, 16_384]))
    if "invariant" in sections:
        fixed = Engine.random(config, device="cuda", cache_bytes=0, batch_invariant=True)
        section("invariant", lambda: invariance(engine, fixed, rate))
        del fixed
    engine = None
    gc.collect()
    torch.cuda.empty_cache()
    section("peer", lambda: peer(config, lengths))
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
