"""`hybridlm verify MODEL`: do all ways to compute this model's output agree?"""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from hybridlm.cli._common import JsonOption, KVOption, ModelArgument, ThreadsOption, print_json, resolved

if TYPE_CHECKING:
    from hybridlm.engine import Engine
    from hybridlm.evals.agreement import Agreement
    from hybridlm.evals.paths import Pair


def command(
    model: ModelArgument,
    against: Annotated[str | None, typer.Option("--against", metavar="MODEL2", help="Compare with this model instead "
                                                "(another format of it, say): it is the reference.")] = None,
    torch: Annotated[str | None, typer.Option("--torch", metavar="FOLDER", help="Compare with the PyTorch model of a "
                                              "Hugging Face folder in float32: it is the reference.")] = None,
    text: Annotated[Path | None, typer.Option("--text", help="A file to read; else the model's own text and random "
                                                             "tokens.")] = None,
    length: Annotated[int, typer.Option("--length", "-n", min=2, help="Tokens to read.")] = 1024,
    mean_kl: Annotated[float | None, typer.Option("--mean-kl", min=0, help="The budget in nats per token, where the "
                                                                           "pair's own does not fit.")] = None,
    max_kl: Annotated[float | None, typer.Option("--max-kl", min=0, help="The budget of the worst position, "
                                                                         "nats.")] = None,
    device: Annotated[str, typer.Option("--device", help="cpu, or cuda: then the GPU engine's ways to read are "
                                                         "compared.")] = "cpu",
    threads: ThreadsOption = None,
    kv_type: KVOption = "f16",
    json: JsonOption = False,
) -> int:
    """Check that all ways to compute a model's output agree; exit status 0 when they do.

    hybridlm verify MODEL

    Without another model: reading in one go against token by token, in odd pieces, beside other sequences, and from
    saved states, all with float32 kernels and again with the fast 8-bit ones; those two against each other; and keys
    and values in each format. Told are the Kullback-Leibler divergence of the next token's distribution, whether the
    first choice is the same, the worst position, and whether the difference grows with length.

    On a GPU the reference is float32 by PyTorch's own operations. Against it: those operations in bfloat16, and every
    fast path, recorded, batched, in pieces, batch-invariant; these may differ by 1.1 times what the former do.
    """
    from hybridlm.cli._progress import Stages
    from hybridlm.engine import Engine
    from hybridlm.evals.agreement import compare

    gpu = device.startswith("cuda")
    with ExitStack() as stack, Stages() as stages:
        file = resolved(model)

        def opened(path: Path, **options: Any) -> Engine:
            own = {"kv_type": kv_type} if not gpu or kv_type != "f16" else {}  # a GPU's own choice is bf16
            return stack.enter_context(Engine.open(path, device, threads=threads, cache_bytes=0, **{**own, **options}))

        engine = opened(file)
        texts = [_read(text, engine, length)] if text else _own(engine, length)
        other_engine, limits = _other(against, engine, opened), (mean_kl, max_kl)
        results: list[Agreement] = []
        pairs: list[Pair]
        if gpu and other_engine is None and torch is None:
            pairs = _gpu_pairs(engine, lambda **o: opened(file, **o), limits, results)
        else:
            pairs = _pairs(engine, lambda **o: opened(file, **o), other_engine, torch, limits)
        for number, (reference, other, budget) in enumerate(pairs, 1):
            began = time.perf_counter()
            if callable(budget):
                budget = budget()

            def show(rows: int, number: int = number, name: str = f"{reference.name} / {other.name}") -> None:
                stages.status(f"{number} of {len(pairs)}: {name}, {rows:,} positions")

            results.append(compare(reference, other, texts, budget, progress=show))
            if not json:
                _print(results[-1], number == 1, time.perf_counter() - began)
    passed = all(r.passed for r in results)
    if json:
        print_json({"model": str(file), "against": against or torch, "pairs": [r.to_dict() for r in results],
                    "passed": passed})
    else:
        _explain(results)
    return 0 if passed else 1


def _pairs(engine: Engine, opened: Any, other: Engine | None, folder: str | None,
           limits: tuple[float | None, float | None]) -> list[Pair]:
    from hybridlm.evals.agreement import Budget, Path
    from hybridlm.evals.paths import EIGHT_BIT, EXACT, pairs_of, whole

    def budget(default: Budget) -> Budget:
        mean, worst = limits
        return Budget(default.mean_kl if mean is None else mean, default.max_kl if worst is None else worst,
                      default.top1)

    loose = Budget(mean_kl=0.05, max_kl=2.0, top1=0.95)  # q4 formats differ by 0.02 nats or so
    if folder is not None:
        from hybridlm.evals.torch_scorer import open_scorer

        return [(Path("PyTorch float32", open_scorer(folder).rows), whole(engine, engine.name), budget(loose))]
    if other is not None:
        return [(whole(other, other.name), whole(engine, engine.name), budget(loose))]
    exact = opened(exact=True, kv_type="f32")
    float32 = whole(exact, "float32 kernels")
    return [*pairs_of(exact, budget(EXACT), "float32 "), *pairs_of(engine, budget(EIGHT_BIT), "8-bit "),
            (float32, whole(engine, f"8-bit kernels, {engine.layout.kv_type} cache"), budget(EIGHT_BIT)),
            (float32, whole(opened(exact=True, kv_type="f16"), "f16 cache"), budget(Budget(1e-4, 1e-2, 0.999))),
            (float32, whole(opened(exact=True, kv_type="q8_0"), "q8_0 cache"), budget(EIGHT_BIT))]


def _gpu_pairs(engine: Engine, opened: Any, limits: tuple[float | None, float | None], results: list[Agreement]
               ) -> list[Pair]:
    from hybridlm.evals.agreement import Budget
    from hybridlm.evals.paths import BF16, device_pairs

    wanted = Budget(BF16.mean_kl if limits[0] is None else limits[0], BF16.max_kl if limits[1] is None else limits[1],
                    BF16.top1)
    plain = opened(plain=True)
    return device_pairs(opened(exact=True), plain, engine, opened(batch_invariant=True), wanted, results)


def _other(name: str | None, engine: Engine, opened: Any) -> Engine | None:
    from hybridlm.errors import HybridLMError

    if name is None:
        return None
    other: Engine = opened(resolved(name))
    if other.config.vocab_size != engine.config.vocab_size or (
            other.has_tokenizer and engine.has_tokenizer
            and other.tokenizer.fingerprint != engine.tokenizer.fingerprint):
        raise HybridLMError(f"{name}: has another tokenizer than {engine.name}, so their outputs do not compare; give "
                            "another format of the same model")
    return other


def _read(file: Path, engine: Engine, length: int) -> np.ndarray:
    start = engine.eos[:1]
    ids = engine.tokenizer.encode(file.read_text(encoding="utf-8", errors="replace"), special=False)
    return np.array([*start, *ids][:length], np.int32)


def _own(engine: Engine, length: int) -> list[np.ndarray]:
    """What the model writes by itself, where it is at home, and random tokens, where it is not."""
    rng = np.random.default_rng(0)
    start = list(engine.eos[:1]) or [int(rng.integers(engine.config.vocab_size))]
    written = engine.generate(start, max_tokens=length - 1, seed=0, ignore_eos=True)
    own = [*start, *(piece.token for piece in written)]
    return [np.array(own, np.int32), rng.integers(engine.config.vocab_size, size=min(length, 256), dtype=np.int32)]


def _print(r: Agreement, first: bool, seconds: float) -> None:
    if first:
        print(f"{'reference':<24}{'other':<32}{'mean KL':>9}{'max KL':>9} at {'top-1':>12}{'clear':>8}  growth")
    print(f"{r.reference:<24}{r.other:<32}{r.mean_kl:>9.1e}{r.max_kl:>9.1e} {r.worst[1]:<6}{r.top1:>9.2%}"
          f"{r.top1_clear:>8.2%}{r.growth:>7.1f}  {'ok' if r.passed else 'FAILED'}  {seconds:.1f} s", flush=True)


def _explain(results: list[Agreement]) -> None:
    failed = [r for r in results if not r.passed]
    for r in failed:
        print(f"{r.other} against {r.reference}: {'; '.join(r.broken)}")
    positions = results[0].rows
    print(f"{len(results) - len(failed)} of {len(results)} pairs agree, over {positions:,} positions each; KL in nats "
          "per token; clear: positions where the first choice leads by more than 0.1 nat")
