"""The gated delta rule on a GPU beside flash-linear-attention and this package's PyTorch form, with arithmetic floors.

Prints tables and, with --json FILE, keeps all figures with their versions. First the relative errors of results and
gradients against the recurrence in float64, then times: medians of rounds in which all rows take turns, each call
after the L2 cache was overwritten, once called from Python ("eager") and once replayed from a CUDA graph. Norms of q
and k are inside on every side, gates outside on every side. Attention (SDPA) stands beside for scale.

A floor is the larger of FLOP / 790 TFLOP/s and bytes / 4.3 TB/s, what an H200 does at best: the products of chunks of
64 tokens and each input and output once. fla 0.6 refuses its backward pass on Hopper with Triton 3.4 to 3.7.0, which
miscompile it; where tilelang is missing it is timed with the refusal switched off and marked, its gradients are wrong.

    python benchmarks/gpu_kernels.py [--rounds 30] [--json FILE] [--skip errors|forward|backward ...]
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import importlib.util
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridlm.ops import chunk_gated_delta_rule, gated_delta_rule

OLMO = {"heads": 30, "key": 96, "value": 192}
SQUARE = {"heads": 32, "key": 128, "value": 128}
FORWARD = [(1, 4096, OLMO), (8, 4096, OLMO), (1, 16384, OLMO), (1, 65536, OLMO), (8, 4096, SQUARE)]
BACKWARD = [(8, 4096, OLMO), (1, 32768, OLMO), (8, 4096, SQUARE)]
FLOPS, BANDWIDTH = 790e12, 4.3e12
HARD = {  # name: (beta, spread of the keys about one direction, largest decay)
    "ordinary": (None, None, 0.1),
    "beta near 2, keys 5% apart, hardly any decay": (2.0, 0.05, 1e-3),
    "beta near 2, random keys, no decay": (2.0, None, 0.0),
    "decay near 0": (None, None, 20.0),
}
Rule = Callable[..., tuple[Tensor, Tensor]]


def inputs(batch: int, time: int, heads: int, key: int, value: int, *, beta: float | None = None,
           spread: float | None = None, decay: float = 0.1, seed: int = 0) -> list[Tensor]:
    r = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=r, device="cuda")

    k = normal(batch, time, heads, key)
    if spread is not None:
        k = normal(batch, 1, heads, key) + spread * k
    uniform = torch.rand(2, batch, time, heads, generator=r, device="cuda")
    b = 2 * torch.sigmoid(2 * normal(batch, time, heads)) if beta is None else beta - 1e-3 * uniform[0]
    return [normal(batch, time, heads, key).bfloat16(), k.bfloat16(), normal(batch, time, heads, value).bfloat16(),
            -decay * uniform[1], b]


def ours(*x: Tensor, initial_state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return chunk_gated_delta_rule(*x, initial_state=initial_state)


def eager(*x: Tensor, initial_state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return chunk_gated_delta_rule(*x, initial_state=initial_state, chunk_size=64)


class Portable(torch.autograd.Function):
    """The Triton kernels, which run on more than the GPUs that the operator has CUDA kernels for."""

    @staticmethod
    def forward(ctx, *x: Tensor) -> tuple[Tensor, Tensor]:
        from hybridlm.ops.triton import delta_rule

        ctx.save_for_backward(*x)
        return delta_rule.forward(*x)

    @staticmethod
    def backward(ctx, do: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
        from hybridlm.ops.triton import delta_rule

        grads = delta_rule.backward(do.contiguous(), dstate.contiguous(), *ctx.saved_tensors)
        return grads[:len(ctx.saved_tensors)]


def portable(*x: Tensor, initial_state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return Portable.apply(*x, *(() if initial_state is None else (initial_state,)))


def peer() -> tuple[Rule | None, str]:
    """fla's rule, and what must be said of its gradients."""
    if importlib.util.find_spec("fla") is None:
        return None, ""
    import fla.ops.common.chunk_o as guard
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule as rule

    note = ""
    if importlib.util.find_spec("tilelang") is None:
        guard.TRITON_ABOVE_3_7_1 = True
        note = "timing only, gradients wrong"

    def fla(*x: Tensor, initial_state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return rule(*x, initial_state=initial_state, output_final_state=True, use_qk_l2norm_in_kernel=True)

    return fla, note


def floor(batch: int, time: int, heads: int, key: int, value: int) -> tuple[float, float]:
    """Milliseconds for the forward and the backward pass."""
    chunk = 64
    flop = 2 * (2 * chunk * key + chunk * (key + value) + 3 * key * value + chunk * value) + 2 * chunk * chunk / 3
    forward, backward = 4 * (key + value) + 8, 8 * key + 6 * value + 16
    n = batch * time * heads * 1e3
    return (n * max(flop / FLOPS, forward / BANDWIDTH), n * max(2.735 * flop / FLOPS, backward / BANDWIDTH))


# -- errors ----------------------------------------------------------------------------------------------------------

NAMES = ("o", "state", "dq", "dk", "dv", "dg", "dbeta", "dstart")


def results(rule: Rule, x: list[Tensor], start: Tensor, do: Tensor, dstate: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (*x, start)]
    o, state = rule(*leaves[:5], initial_state=leaves[5])
    loss = (o.double() * do).sum() + (state.double() * dstate).sum()
    return [o.detach(), state.detach(), *torch.autograd.grad(loss, leaves)]


def errors(rules: dict[str, Rule]) -> dict[str, dict[str, dict[str, float]]]:
    table: dict[str, dict[str, dict[str, float]]] = {}
    print("relative error against float64" + " " * 24 + "".join(f"{name:>9}" for name in NAMES))
    for case, (beta, spread, decay) in HARD.items():
        x = inputs(1, 300, **OLMO, beta=beta, spread=spread, decay=decay)
        r = torch.Generator("cuda").manual_seed(1)
        start, dstate = (torch.randn(1, 30, 96, 192, generator=r, device="cuda") for _ in range(2))
        do = torch.randn(x[2].shape, generator=r, device="cuda").bfloat16()
        want = results(gated_delta_rule, [t.double() for t in x], start.double(), do, dstate)
        table[case] = {}
        print(case)
        for name, rule in rules.items():
            try:
                got = results(rule, x, start, do, dstate)
            except Exception as error:
                print(f"    {name}: {str(error)[:200]}", flush=True)
                continue
            table[case][name] = {n: float((a.double() - b).norm() / b.norm())
                                 for n, a, b in zip(NAMES, got, want, strict=True)}
            print(f"    {name:50}" + "".join(f"{e:9.1e}" for e in table[case][name].values()), flush=True)
    return table


# -- times -----------------------------------------------------------------------------------------------------------

def graphed(call: Callable[[], object]) -> Callable[[], object]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def medians(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Milliseconds of each call, which take turns."""
    cache = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            cache.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times[name].append(begin.elapsed_time(end))
    return {name: statistics.median(t) for name, t in times.items()}


def with_graphs(calls: dict[str, Callable[[], object]]) -> dict[str, Callable[[], object]]:
    """Each call and its graph, as far as it works."""
    out = {}
    for name, call in calls.items():
        try:
            call()
            out[name] = call
            out[name + ", graph"] = graphed(call)
        except Exception as error:
            torch.cuda.synchronize()
            print(f"    {name}: {str(error)[:200]}", flush=True)
    return out


def training(rule: Rule, x: list[Tensor], do: Tensor) -> Callable[[], object]:
    leaves = [t.detach().clone().requires_grad_() for t in x]
    return lambda: torch.autograd.grad(rule(*leaves)[0], leaves, do)


def times(rules: dict[str, Rule], shapes: list, backward: bool, rounds: int) -> list[dict]:
    rows = []
    for batch, time, shape in shapes:
        x = inputs(batch, time, **shape)
        do = torch.randn_like(x[2])
        calls: dict[str, Callable[[], object]] = {
            name: training(rule, x, do) if backward else functools.partial(rule, *x) for name, rule in rules.items()
            if name != "pytorch" or batch * time <= 16384}
        if not backward:
            heads = torch.randn(3, batch, shape["heads"], time, 128, dtype=torch.bfloat16, device="cuda")
            attention = functools.partial(F.scaled_dot_product_attention, *heads, is_causal=True)
            calls["attention, heads of 128"] = attention
        with torch.set_grad_enabled(backward):
            found = medians(with_graphs(calls), rounds)
        least = floor(batch, time, **shape)
        least_ms = sum(least) if backward else least[0]
        title = f"{'forward + backward' if backward else 'forward'} {batch} x {time}, {shape['heads']} heads, " \
                f"{shape['key']} x {shape['value']}"
        print(f"{title}: floor {least_ms:.3f} ms")
        best = min((ms for name, ms in found.items() if name.startswith("fla")), default=None)
        for name, ms in found.items():
            ratio = "" if best is None else f"{best / ms:8.2f}x fla"
            print(f"    {name:40}{ms:9.3f} ms{ms / least_ms:7.2f}x floor{ratio}", flush=True)
        rows.append({"shape": title, "floor_ms": least_ms, "ms": found})
        del calls
        torch.cuda.empty_cache()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--skip", nargs="*", default=[], choices=["errors", "forward", "backward"])
    args = parser.parse_args()
    fla, note = peer()
    rules: dict[str, Rule] = {"hybridlm": ours, "hybridlm, Triton alone": portable}
    if fla is not None:
        rules[f"fla ({note})" if note else "fla"] = fla
    rules["pytorch"] = eager
    out: dict[str, object] = {"gpu": torch.cuda.get_device_name()}
    for package in ("torch", "triton", "fla-core", "tilelang", "hybridlm"):
        try:
            out[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            out[package] = None
    print(out)
    if "errors" not in args.skip:
        out["errors"] = errors(rules)
    if "forward" not in args.skip:
        out["forward"] = times(rules, FORWARD, False, args.rounds)
    if "backward" not in args.skip:
        out["backward"] = times(rules, BACKWARD, True, args.rounds)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
