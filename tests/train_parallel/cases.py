"""One set of processes that runs many layouts and compares each with one process; tests/train_parallel calls it."""

from __future__ import annotations

import os
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.tensor import DTensor

from hybridlm.config import HybridConfig, Rope
from hybridlm.model import HybridLM
from hybridlm.ops import linear_cross_entropy
from hybridlm.train.parallel import Layout, Parallel

TIME, VOCAB = 48, 61
Case = tuple[str, Layout, dict[str, Any], dict[str, Any]]  # name, layout, options of `config`, of `compare`


def config(*, heads: int = 6, kv: int | None = None, rope: bool = True, window: int | None = None, value: int = 1,
           tied: bool = False) -> HybridConfig:
    kinds = ("linear_attention", "full_attention") if window is None else ("linear_attention", "sliding_attention")
    return HybridConfig(vocab_size=VOCAB, hidden_size=heads * 4, intermediate_size=40, layer_types=kinds * 2,
                        num_attention_heads=heads, num_key_value_heads=kv, linear_num_key_heads=heads,
                        linear_num_value_heads=heads * value, linear_key_head_dim=4, linear_value_head_dim=6,
                        rope=Rope(10_000.0) if rope else None, tie_word_embeddings=tied,
                        sliding_window=window, max_position_embeddings=TIME)


def batch(rows: int, documents: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same on every rank: ids, targets (some not counted), documents that end inside and at the borders."""
    generator = torch.Generator().manual_seed(3)
    ids, targets = torch.randint(VOCAB, (2, rows, TIME), generator=generator)
    targets[:, 5] = -1
    if not documents:
        return ids, targets, None
    ends = [(5, 16, 24, 25), (12, 24, 36, 47), (1, 2, 30, 31), (23, 33, 40, 41)]
    numbers = torch.stack([torch.bucketize(torch.arange(TIME), torch.tensor(ends[r % 4]), right=True)
                           for r in range(rows)])
    return ids, targets, numbers


def loss_of(model: HybridLM, parallel: Parallel | None, ids: Tensor, targets: Tensor, documents: Tensor | None,
            count: Tensor) -> Tensor:
    hidden = model.hidden(ids, documents=documents)
    targets = parallel.mine(targets) if parallel else targets
    return linear_cross_entropy(hidden.flatten(0, 1), model.head_weight, targets.flatten()) / count


def compare(layout: Layout, options: dict[str, Any], *, rows: int, pieces: int, documents: bool,
            recompute: float, dtype: torch.dtype) -> float:
    """The largest difference from one process: of the loss; of each gradient, relative to its largest entry or 0.05,
    as gradients through the norms of short queries round more; and of the norm."""
    whole, model = HybridLM(config(**options)).to(dtype), HybridLM(config(**options)).to(dtype)
    ids, targets, numbers = batch(rows, documents)
    count = (targets >= 0).sum().float()
    expected = loss_of(whole, None, ids, targets, numbers, count)
    expected.backward()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    parallel = Parallel(torch.device("cpu"), rank, world, layout)
    parallel.apply(model, compute_dtype=None, recompute=recompute, compile=False)
    each = rows // parallel.data_world
    mine = slice(parallel.data_rank * each, (parallel.data_rank + 1) * each)
    ids, targets, numbers = ids[mine], targets[mine], None if numbers is None else numbers[mine]
    assert parallel.sum_rows((targets >= 0).sum().float()) == count
    loss, size = torch.zeros((), dtype=dtype), len(ids) // pieces
    for i in range(pieces):
        part = slice(i * size, (i + 1) * size)
        with parallel.accumulate(model, last=i == pieces - 1):
            packed = None if numbers is None else numbers[part]
            share = loss_of(model, parallel, ids[part], targets[part], packed, count)
            share.backward()
        loss += share.detach()
    worst = float((parallel.sum(loss) - expected.detach()).abs())
    truth = dict(whole.named_parameters())
    for name, p in model.named_parameters():
        grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        assert grad is not None and grad.shape == truth[name].shape, name
        difference = (grad - truth[name].grad).abs().max() / truth[name].grad.abs().max().clamp_min(0.05)
        worst = max(worst, float(difference))
    norm = parallel.clip(model.parameters(), 1e-3)
    clipped = torch.nn.utils.clip_grad_norm_(whole.parameters(), 1e-3)
    worst = max(worst, float((norm - clipped).abs() / clipped))
    kept = {n: p.to_local() if isinstance(p, DTensor) else p for n, p in model.named_parameters()}
    if layout.sharded:
        assert sum(p.numel() for p in kept.values()) < 0.8 * sum(p.numel() for p in truth.values())
    return worst


CASE = {"rows": 4, "pieces": 1, "documents": True, "recompute": 0.0, "dtype": torch.float32}


def _worker(rank: int, world: int, folder: str, cases: list[Case]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    results: dict[str, Any] = {}
    for name, layout, options, case in cases:
        try:
            results[name] = compare(layout, options, **{**CASE, **case})
        except Exception:
            results[name] = traceback.format_exc()
            break  # the ranks are no longer at the same place
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def run(world: int, folder: Path, cases: list[Case]) -> dict[str, Any]:
    """By case: the largest difference over all ranks, or what went wrong."""
    mp.spawn(_worker, (world, str(folder), cases), nprocs=world, join=True)
    found = [torch.load(folder / f"{rank}.pt") for rank in range(world)]
    return {name: max((f.get(name, "not run") for f in found), key=lambda v: (isinstance(v, str), v))
            for name, *_ in cases}
