"""A plan in words and tables, for terminals and for `--json`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from hybridlm.plan.run import Plan, Step, fits

__all__ = ["as_data", "table", "tell"]

_PARTS = {"weights": "weights, float32", "gradients": "gradients, float32", "optimizer": "optimizer",
          "casts": "bfloat16 copies", "activations": "activations kept", "working": "one block at work",
          "logits": "logits, head's gradient", "reserve": "CUDA, NCCL, spare"}


def tell(plan: Plan, name: str) -> str:
    """Everything about a plan."""
    c, s, o, f = plan.cluster, plan.chosen, plan.outcome, plan.faults
    n = plan.config
    lines = [
        f"{name}: {n.num_parameters() / 1e9:.3f}B weights ({n.num_parameters(embedding=False) / 1e9:.3f}B outside the "
        f"tables), {plan.tokens:.3g} tokens in sequences of {plan.sequence:,}, {s.tokens:,} a step, on {c.gpus} x "
        f"{c.gpu.name}", "",
        table(("GFLOP a token, forward", ""), [(k, f"{v / 1e9:.3f}") for k, v in _flops(plan)]), "",
        f"Layouts{'' if len(plan.choices) < 2 else ', the fastest first'} (GB a GPU; seconds a step):", "",
        table(("layout", "micro", "accum.", "recompute", "GB", "compute", "data", "tp", "cp", "tokens/s", ""),
              [_row(x, plan) for x in plan.choices[:8]]), "",
        f"Memory of {s.layout}:", "",
        table(("part", "GB"), [(what, f"{getattr(s.memory, key) / 1e9:.1f}") for key, what in _PARTS.items()]
              + [("in all", f"{s.memory.total / 1e9:.1f} of {c.gpu.memory / 1e9:.0f}"),
                 ("kept for backward without recomputing", _whole(plan))]), "",
        f"Speed: {s.tokens_per_s:,.0f} tokens/s, {s.tokens_per_s / c.gpus:,.0f} a GPU, {s.seconds:.3f} s a step"
        + (f", {s.exposed:.3f} of them communication that nothing hides" if s.exposed > 5e-4 else ""),
        f"Checkpoints: every {f.interval / 60:.1f} min ({max(1, round(f.interval / s.seconds)):,} steps), "
        f"{f.stall:.2f} s of standing still each"
        if math.isfinite(f.mtbf) else "Checkpoints: none needed, as nothing fails",
        f"Goodput: {o.goodput:.2%} (+- {o.error:.2%}); {o.failures:.1f} failures, {o.replayed / 3600:.2f} h done "
        f"again, {o.down / 3600:.2f} h down, {o.stalled / 3600:.2f} h in checkpoints; recovery {o.recovery:.0f} s in "
        "the median",
        f"Time: {plan.busy_days:.2f} days of work, {days(plan.days)} with failures",
    ]
    gpu_hours = plan.days * 24 * c.gpus
    money = f", {_round(plan.cost)} at {c.price:g} each" if c.price else " (--price X gives it in money)"
    lines.append(f"Cost: {_round(gpu_hours)} GPU hours{money}")
    return "\n".join([*lines, "", "Assumed:", *(f"- {line}" for line in plan.assumptions)])


def days(value: float) -> str:
    return f"{value:.2f} days" if value >= 1 else f"{24 * value:.1f} hours" if value > 1 / 12 else \
        f"{1440 * value:.0f} minutes"


def _round(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def _flops(plan: Plan) -> list[tuple[str, float]]:
    f = plan.flops
    return [("projections of mixers", f.mixers), ("MLPs", f.mlp), ("head", f.head),
            ("attention, causal half", f.attention), ("delta rule, recurrent form", f.recurrence),
            ("convolutions", f.convolution), ("forward", f.forward), ("forward and backward", f.training)]


def _row(s: Step, plan: Plan) -> tuple[str, ...]:
    return (str(s.layout), str(s.microbatch), str(s.accumulate), f"{s.recompute:.0%}", f"{s.memory.total / 1e9:.0f}",
            f"{s.compute:.3f}", f"{s.data:.3f}", f"{s.tensor:.3f}", f"{s.context:.3f}", f"{s.tokens_per_s:,.0f}",
            "" if fits(s, plan.cluster.gpu) else "does not fit")


def _whole(plan: Plan) -> str:
    from hybridlm.plan.memory import memory

    whole = memory(plan.config, plan.chosen.layout, sequence=plan.sequence, microbatch=plan.chosen.microbatch)
    return f"{whole.activations / 1e9:.1f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns set out with spaces: words to the left, figures to the right."""
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]
    return "\n".join("  " + "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in
                                      enumerate(zip(r, widths, strict=True))).rstrip() for r in [head, *rows])


def as_data(plan: Plan) -> dict[str, Any]:
    """The plan as plain data; infinite is null."""
    s = plan.chosen
    return _plain({
        "parameters": plan.config.num_parameters(), "tokens": plan.tokens, "sequence": plan.sequence,
        "cluster": asdict(plan.cluster), "flops_per_token": {**asdict(plan.flops), "training": plan.flops.training},
        "mfu": plan.mfu, "step": {**asdict(s), "tokens_per_s": s.tokens_per_s, "memory_total": s.memory.total},
        "faults": asdict(plan.faults), "outcome": asdict(plan.outcome), "days": plan.days, "cost": plan.cost,
        "assumptions": plan.assumptions})


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
