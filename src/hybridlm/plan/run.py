"""`make_plan`: a model, some GPUs and a number of tokens -> what fits, how fast, how long, what it costs.

The speed is a measured share of the peak, less what communication cannot hide behind computation. Everything assumed
is in `Plan.assumptions`, in words.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from hybridlm.config import LINEAR, HybridConfig
from hybridlm.errors import ConfigError
from hybridlm.plan.flops import Flops, flops_per_token
from hybridlm.plan.goodput import Faults, Outcome, best_interval, simulate
from hybridlm.plan.machines import GPU, PER_NODE, measured_mfu
from hybridlm.plan.memory import Layout, Memory, memory

__all__ = ["GPU_MTBF_HOURS", "Cluster", "Plan", "Step", "layouts", "make_plan", "step"]

# Llama 3 405B (arXiv 2407.21783, section 3.3.4): 419 unexpected interruptions in 54 days of 16,384 H100.
GPU_MTBF_HOURS = 54 * 24 * 16_384 / 419
LINKS = 0.8  # share of a link's data-sheet rate that collectives reach
FILLED = 0.92  # share of a GPU's memory that a plan may fill


@dataclass(frozen=True)
class Cluster:
    """The machines, and what is assumed of their failures. Hours and seconds as named."""

    gpu: GPU
    gpus: int
    mtbf_hours: float = GPU_MTBF_HOURS  # of one GPU with its share of the node
    detect: float = 60.0  # s: the timeout of a collective, at most
    restart: float = 120.0  # s: processes, NCCL, compiled kernels from their cache, the checkpoint read
    host_rate: float = 20e9  # bytes/s a GPU copies to pinned host memory
    disk_rate: float = 2e9  # bytes/s a node writes to shared storage
    price: float = 0.0  # of a GPU and hour

    @property
    def nodes(self) -> int:
        return -(-self.gpus // PER_NODE)


@dataclass(frozen=True)
class Step:
    """One way to take a step. Seconds a step; `exposed` is communication that nothing hides."""

    layout: Layout
    microbatch: int
    accumulate: int
    recompute: float
    memory: Memory
    compute: float
    data: float  # gathering weights, reducing gradients
    tensor: float
    context: float
    seconds: float
    tokens: int

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def exposed(self) -> float:
        return self.seconds - self.compute


@dataclass(frozen=True)
class Plan:
    """The step chosen, and the run that is made of it."""

    config: HybridConfig
    cluster: Cluster
    tokens: float
    sequence: int
    flops: Flops
    mfu: float
    chosen: Step
    choices: list[Step]  # the best of each layout, the fastest first; those that do not fit last
    faults: Faults
    outcome: Outcome
    assumptions: list[str] = field(default_factory=list)

    @property
    def busy_days(self) -> float:
        """Without failures and checkpoints."""
        return self.tokens / self.chosen.tokens_per_s / 86_400

    @property
    def days(self) -> float:
        return self.busy_days / self.outcome.goodput

    @property
    def cost(self) -> float:
        return self.days * 24 * self.cluster.gpus * self.cluster.price


def make_plan(config: HybridConfig, cluster: Cluster, tokens: float, *, sequence: int = 8192,
              batch_tokens: float = 4_194_304, layout: Layout | None = None, microbatch: int = 0,
              recompute: float | None = None, mfu: float = 0.0, interval: float = 0.0,
              optimizer: str = "adamw") -> Plan:
    """Plan a run.

    Args:
        layout, microbatch, recompute: chosen when None or 0, for the most tokens a second that fit.
        mfu: share of the GPU's peak, 0..1; 0 takes what was measured nearest to this.
        interval: seconds between checkpoints; 0 finds the best.

    Raises `ConfigError` for what cannot be, and where nothing fits.
    """
    batch = round(batch_tokens / sequence)
    if tokens <= 0 or batch < 1 or cluster.gpus < 1:
        raise ConfigError("plan: gpus, tokens and the batch must be positive, and the batch at least a sequence")
    if sequence > config.max_position_embeddings:
        raise ConfigError(f"sequence: {sequence} tokens are more than the model's max_position_embeddings "
                          f"{config.max_position_embeddings}")
    if layout and layout.gpus != cluster.gpus:
        raise ConfigError(f"layout: {layout} is for {layout.gpus} GPUs, not {cluster.gpus}")
    flops = flops_per_token(config, sequence)
    best: dict[Layout, Step] = {}
    for one in [layout] if layout else layouts(config, cluster.gpus):
        if batch % one.data or sequence % one.cp:
            continue
        share = batch // one.data
        for size in [microbatch] if microbatch else [n for n in (1, 2, 4, 8, 16) if share % n == 0]:
            if share % size:
                continue
            for again in (0.0, 0.25, 0.5, 0.75, 1.0) if recompute is None else (recompute,):
                rate = mfu or measured_mfu(config, share / (one.tp * one.cp))[0]
                found = step(config, cluster.gpu, one, flops, sequence=sequence, microbatch=size,
                             accumulate=share // size, recompute=again, mfu=rate, optimizer=optimizer)
                if one not in best or _key(found, cluster) < _key(best[one], cluster):
                    best[one] = found
    choices = sorted(best.values(), key=lambda s: _key(s, cluster))
    if not choices:
        raise ConfigError(f"batch: {batch} sequences of {sequence} tokens do not divide among {cluster.gpus} GPUs; "
                          "give another --batch-tokens, or a layout with tp or cp")
    chosen = choices[0]
    if not fits(chosen, cluster.gpu):
        raise ConfigError(f"memory: the least that {layout or 'any layout'} needs is {chosen.memory.total / 1e9:.0f} "
                          f"GB a GPU, and {cluster.gpu.name} has {cluster.gpu.memory / 1e9:.0f}; take more GPUs, or "
                          "tp or cp for long sequences")
    work = tokens / chosen.tokens_per_s
    faults = _faults(config, cluster, chosen)
    faults = replace(faults, interval=interval) if interval else best_interval(faults)
    outcome = simulate(faults, work, runs=256)
    mfu_used, source = (mfu, f"{mfu:.1%}, as given") if mfu else \
        measured_mfu(config, batch / cluster.gpus)
    plan = Plan(config, cluster, tokens, sequence, flops, mfu_used, chosen, choices, faults, outcome)
    return replace(plan, assumptions=_assumptions(plan, source, not mfu))


def fits(s: Step, gpu: GPU) -> bool:
    """Whether a step leaves the spare room."""
    return s.memory.total <= FILLED * gpu.memory


def _key(s: Step, cluster: Cluster) -> tuple[bool, float, float, int, int]:
    """What fits first (else the least memory), then the fastest, then the plainest."""
    good = fits(s, cluster.gpu)
    return (not good, round(s.seconds, 4) if good else s.memory.total, s.recompute, s.layout.tp * s.layout.cp,
            s.layout.dp_shard)


def layouts(config: HybridConfig, gpus: int) -> Iterator[Layout]:
    """All that share out the GPUs in powers of two, tp within a node and never more ways than heads."""
    twos = [2**k for k in range(gpus.bit_length()) if gpus % 2**k == 0]
    for tp in (n for n in twos if n <= min(PER_NODE, config.num_attention_heads)):
        for cp in (n for n in twos if n <= 16 and gpus % (tp * n) == 0):
            rest = gpus // (tp * cp)
            for shard in {n for n in (*twos, rest) if rest % n == 0}:
                yield Layout(rest // shard, shard, tp, cp)


def step(config: HybridConfig, gpu: GPU, layout: Layout, flops: Flops, *, sequence: int, microbatch: int,
         accumulate: int, recompute: float, mfu: float, optimizer: str = "adamw") -> Step:
    """Seconds of a step: computation at `mfu`, sharding's collectives behind it, tensor's and context's in its way."""
    local = microbatch * sequence / layout.cp * accumulate  # tokens a GPU sees in a step
    work = flops.training + recompute * (flops.forward - flops.head)
    compute = local * work / layout.tp / (mfu * gpu.peak)
    n = config.num_parameters() / layout.tp
    shard = layout.dp_shard
    # each microbatch: weights gathered in bfloat16 forward and backward, gradients reduced in float32; once: replicas
    data = _ring(gpu, 8 * n, shard, layout.tp * layout.cp) * accumulate if shard > 1 else 0.0
    data += 2 * _ring(gpu, 4 * n / shard, layout.dp_replicate * layout.cp, layout.tp * shard)
    d, tokens = config.hidden_size, local
    linear = sum(kind == LINEAR for kind in config.layer_types)
    attention = config.num_hidden_layers - linear
    # forward and backward, the mixer's and the MLP's sum, each an all-reduce (twice a ring) of bfloat16 [tokens, d]
    tensor = 2 * config.num_hidden_layers * 2 * _ring(gpu, 2 * 2 * d * tokens, layout.tp, 1)
    # keys and values of attention gathered forward and again backward, their gradients reduced; the state's affine
    # summary, K x K and K x V in float32, of each head and rank, forward and backward
    kv = 2 * config.kv_heads * config.head_dim / layout.tp
    summary = 4 * config.value_heads * config.key_dim * (config.key_dim + config.value_dim) / layout.tp
    context = _ring(gpu, 3 * attention * 2 * kv * tokens * layout.cp
                    + 2 * linear * summary * layout.cp * microbatch * accumulate, layout.cp, layout.tp)
    held = memory(config, layout, sequence=sequence, microbatch=microbatch, recompute=recompute, optimizer=optimizer)
    return Step(layout, microbatch, accumulate, recompute, held, compute, data, tensor, context,
                max(compute, data) + tensor + context, round(local * layout.cp * layout.data))


def _ring(gpu: GPU, nbytes: float, ranks: int, apart: int) -> float:
    """Seconds to gather or reduce-scatter `nbytes` over ranks that lie `apart` GPUs from each other.

    Within a node all come over NVLink. Across nodes each node's share comes over all its network cards together.
    """
    if ranks <= 1:
        return 0.0
    inside = max(1, min(ranks, PER_NODE // apart))
    nodes = -(-ranks // inside)
    local = nbytes * (inside - 1) / inside / gpu.nvlink if inside > 1 else 0.0
    across = nbytes * (nodes - 1) / nodes / (inside * gpu.network)
    return max(local, across) / LINKS


def _faults(config: HybridConfig, cluster: Cluster, chosen: Step) -> Faults:
    """What a checkpoint costs: 12 bytes a weight, copied by each GPU of one replica, then written by its nodes."""
    layout = chosen.layout
    holders = layout.dp_shard * layout.tp
    nbytes = 12.0 * config.num_parameters()
    return Faults(mtbf=cluster.mtbf_hours * 3600 / cluster.gpus if cluster.mtbf_hours else math.inf, interval=0.0,
                  stall=nbytes / holders / cluster.host_rate,
                  write=nbytes / (cluster.disk_rate * max(1, -(-holders // PER_NODE))),
                  detect=cluster.detect, restart=cluster.restart)


def _assumptions(plan: Plan, source: str, measured: bool) -> list[str]:
    c = plan.cluster
    f = plan.faults
    lines = [
        "FLOP: products, causal half of attention, delta rule as a recurrence; forward x 3, recomputation not counted. "
        f"Kernels execute {plan.flops.executed(plan.chosen.recompute) / plan.flops.training:.3f} times that.",
        f"MFU: {source}, of {c.gpu.peak / 1e12:.0f} TFLOP/s dense bfloat16 ({c.gpu.name}).",
    ]
    if measured and c.gpu.name[:2] != "H2":
        lines.append(f"MFU on {c.gpu.name} is not measured: the H200's share of its peak is taken.")
    if measured and plan.config.num_parameters() > 2e9:
        lines.append("MFU of a model of this size is not measured: the 1b's is taken.")
    return [
        *lines,
        f"Memory: float32 weights, gradients and moments, bfloat16 activations of compiled blocks; at most {FILLED:.0%}"
        " of the GPU filled. Two peaks measured on an H200 were 2% and 16% above this count.",
        f"Links: NVLink {c.gpu.nvlink / 1e9:.0f} GB/s among {PER_NODE} GPUs, network {c.gpu.network / 1e9:.0f} GB/s a "
        f"GPU, {LINKS:.0%} of both reached; sharding's traffic hides behind computation, tp's and cp's does not.",
        f"Failures: one in {c.mtbf_hours:,.0f} hours of a GPU (Llama 3, arXiv 2407.21783: 419 in 54 days of 16,384), "
        f"so one in {f.mtbf / 3600:,.1f} hours of {c.gpus}." if math.isfinite(f.mtbf) else "Failures: none.",
        f"Checkpoints: 12 bytes a weight; copied at {c.host_rate / 1e9:.0f} GB/s a GPU ({f.stall:.2f} s of standing "
        f"still), written at {c.disk_rate / 1e9:.0f} GB/s a node ({f.write:.0f} s, training goes on).",
        f"Recovery: noticed after {f.detect:.0f} s, running again {f.restart:.0f} s later, then the work since the "
        "last checkpoint again.",
        "Not in it: validation, queueing for machines, tokenising, people.",
    ]

