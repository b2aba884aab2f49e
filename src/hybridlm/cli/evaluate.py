"""`hybridlm eval TASK[,TASK...] MODEL`: benchmarks, RULER, and bits per byte of given text."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybridlm.cli._common import JsonOption, KVOption, ThreadsOption, note, open_engine, print_json, size

if TYPE_CHECKING:
    from hybridlm.engine import Engine
    from hybridlm.evals import BitsPerByte
    from hybridlm.evals.run import Plan, Result


def command(
    tasks: Annotated[str | None, typer.Argument(metavar="TASK[,TASK...]", help="Names of tasks, NAME or NAME:FORM; "
                                                                               "none lists them.")] = None,
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="A GGUF file, a model folder, or a hub "
                                                                      "repository.")] = None,
    files: Annotated[list[Path] | None, typer.Argument(metavar="FILE...", help="For bpb: text, .jsonl(.gz, .zst) or "
                                                       ".parquet files, or folders of them.")] = None,
    data: Annotated[str | None, typer.Option("--data", envvar="HYBRIDLM_DATA", metavar="DIR", help="Folder with the "
                                             "benchmarks' items; 'hub' fetches them.")] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Folder for records and results; the same "
                                                                          "command goes on there.")] = None,
    shots: Annotated[int | None, typer.Option("--shots", min=0, help="Worked examples before each item; the task's own "
                                                                     "number when left out.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only the first N items, of MMLU of each "
                                                                     "subject.")] = None,
    context: Annotated[int | None, typer.Option("--context", min=2, help="Most tokens of a text; the model's own when "
                                                                         "left out.")] = None,
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut items that are too long from the left.")] = False,
    run_code: Annotated[bool, typer.Option("--run-code", help="Run programs that the model writes, in a process with "
                                           "limits. They can still do harm: use a machine that may break.")] = False,
    lengths: Annotated[str, typer.Option("--lengths", help="For ruler: tokens of a prompt, several by commas.",
                                         rich_help_panel="RULER")] = "4096",
    samples: Annotated[int, typer.Option("--samples", min=1, help="For ruler: samples of each task and length.",
                                         rich_help_panel="RULER")] = 100,
    haystack: Annotated[Path | None, typer.Option("--haystack", help="For ruler: a text to hide needles in; else made "
                                                  "sentences.", rich_help_panel="RULER")] = None,
    seed: Annotated[int, typer.Option("--seed", help="For ruler.", rich_help_panel="RULER")] = 0,
    text: Annotated[str, typer.Option("--text", help="For bpb: the field of JSON lines and Parquet that holds text.")]
    = "text",
    threads: ThreadsOption = None,
    kv_type: KVOption = None,
    json: JsonOption = False,
) -> None:
    """Measure a model on benchmarks in a folder, or on your own text.

    hybridlm eval mmlu,arc_easy MODEL --data DIR --out DIR

    hybridlm eval ruler MODEL --lengths 4096,32768 --samples 20

    hybridlm eval bpb MODEL book.txt notes/
    """
    if tasks is None:
        return _list()
    if model is None:
        raise typer.BadParameter("give a model after the tasks", param_hint="MODEL")
    if tasks == "bpb":
        return _bpb(model, files or [], text, context, threads, kv_type, json)
    if files:
        raise typer.BadParameter(f"{files[0]}: files are for bpb; benchmarks are read from --data", param_hint="FILE")
    names = [name.strip() for name in tasks.split(",")]
    return _tasks(names, model, data, out,
                  {"shots": shots, "limit": limit, "truncate": truncate, "run_code": run_code},
                  {"lengths": _numbers(lengths), "samples": samples, "haystack": haystack, "seed": seed},
                  {"context": context, "threads": threads, "kv_type": kv_type}, json)


def _tasks(names: list[str], model: str, data: str | None, out: Path | None, options: dict[str, Any],
           ruler_options: dict[str, Any], machine: dict[str, Any], json: bool) -> None:
    from hybridlm.cli._progress import Stages
    from hybridlm.errors import ConfigError
    from hybridlm.evals import open_task, ruler, tasks
    from hybridlm.evals.run import run

    offline, missing = ruler.available(data)
    if "ruler" in names and missing:
        note(f"left out, for want of their files: {', '.join(missing)} (see hybridlm eval)")
    names = [n for name in names for n in (offline if name == "ruler" else [name])]
    longest = 0
    if not options["run_code"] and out is None and {"humaneval:generate", "mbpp:generate"} & set(names):
        raise ConfigError("out: give --out DIR to keep the programs that the model writes, or --run-code to run them")
    for name in names:  # before the model is opened, so that a slip of the pen costs nothing
        if name.startswith("ruler_"):
            ruler.check(name, data, ruler_options["lengths"])
            longest = max(ruler_options["lengths"])
            continue
        tasks.parse(name, options["shots"])
        if data is None:
            raise ConfigError("data: give the folder that holds the benchmarks' items, --data DIR (or HYBRIDLM_DATA), "
                              "or --data hub to fetch them")
    folder = None if data in (None, "hub") else Path(data or "")
    with open_engine(model, cache_bytes=1 << 28, **machine) as engine, Stages() as stages:
        if longest > engine.context and machine["context"] is None:
            engine.close()
            raise ConfigError(f"lengths: {longest:,} tokens do not fit in the context of {engine.context:,} that "
                              f"{engine.name} was made for; --context {longest} reads on beyond it")
        plans: list[Plan] = []
        for name in names:
            if name.startswith("ruler_"):
                plans += ruler.plans(name, engine.tokenizer, data=folder, **ruler_options)
            else:
                plans.append(open_task.plan(name, folder, engine.tokenizer, engine.context, **options))
        results = []
        for number, plan in enumerate(plans):
            def show(done: int, total: int, label: str = plan.label) -> None:
                stages.status(f"{label}: {done:,} of {total:,} items")

            try:
                results.append(run(plan, engine, model=_named(engine), out=out, progress=show))
            except KeyboardInterrupt:
                note("interrupted; " + (f"the same command goes on, records are in {out}" if out else
                                        "with --out DIR it would go on where it was"))
                raise
            if not json:
                _print(results[-1], number == 0)
    means = ruler.means(results)
    if json:
        print_json({"results": [r.to_dict() for r in results], "ruler_means": means})
    for length, (score, error, count) in means.items() if not json else ():
        print(f"{f'mean of {count} ruler tasks@{length}':<39}  score {score:.4f} ± {error:.4f}")


def _named(engine: Engine) -> dict[str, Any]:
    """What says which model this is, and how it was computed."""
    return {"name": engine.name, "fingerprint": engine.layout.fingerprint, "bytes": engine.model_bytes,
            "tokenizer": engine.tokenizer.fingerprint, "device": engine.device, "kv_type": engine.layout.kv_type,
            "context": engine.context}


def _print(result: Result, first: bool) -> None:
    if first:
        print(f"{'task':<32}{'items':>7}  figures, ± standard error")
    figures = "  ".join(f"{name} {f['value']:.4f}" + ("" if f["stderr"] is None else f" ± {f['stderr']:.4f}")
                        for name, f in result.figures.items()) or "written to outputs.jsonl, not run"
    again = f", {result.resumed:,} items were there" if result.resumed else ""
    print(f"{result.task:<32}{result.items:>7,}  {figures}  ({result.seconds:.1f} s{again})", flush=True)


def _numbers(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no list of numbers, for instance 4096,8192",
                                 param_hint="--lengths") from None
    return found


def _list() -> None:
    """The tasks by name."""
    from hybridlm.evals import ruler
    from hybridlm.evals.tasks import TASKS

    print(f"{'bpb':<28}bits per byte of your own text, by label and by position")
    for task in TASKS.values():
        forms = ", ".join(task.forms) + (f"; {task.shots} worked examples" if task.shots else "")
        print(f"{task.name:<28}{task.about} ({forms}; reads {task.file})")
    print(f"{'ruler':<28}all that follow")
    for name, about in ruler.TASKS.items():
        print(f"{name:<28}{about}")
    print("\nNAME:FORM chooses a form, the first one otherwise. hybridlm eval mmlu,piqa MODEL --data DIR --out DIR")


def _bpb(model: str, files: list[Path], text: str, context: int | None, threads: int | None, kv_type: str | None,
         json: bool) -> None:
    """Bits per byte of text: lower is better, and models with different tokenizers compare."""
    from hybridlm.cli._progress import Stages
    from hybridlm.evals import bits_per_byte, documents_of

    if not files:
        raise typer.BadParameter("give text to evaluate on", param_hint="FILE...")
    with open_engine(model, threads=threads, kv_type=kv_type, cache_bytes=0) as engine, Stages() as stages:
        began = time.perf_counter()
        result = bits_per_byte(engine, engine.tokenizer, documents_of(files, text_field=text), context=context,
                               progress=lambda sums: stages.status(f"{size(sums.bytes)} of text, "
                                                                   f"{sums.bits_per_byte:.4f} bits per byte so far"))
        seconds = time.perf_counter() - began
    if json:
        return print_json({**_figures(result), "labels": {k: _figures(v) for k, v in sorted(result.labels.items())},
                           "positions": [{"first": a, "last": b, **_figures(p)} for a, b, p in result.by_position()],
                           "seconds": seconds, "tokens_per_s": result.tokens / seconds, "model": engine.name})
    print(f"{result.bits_per_byte:.4f} bits per byte ({result.documents:,} documents, {size(result.bytes)}, "
          f"{result.tokens:,} tokens, {result.tokens / seconds:,.0f} tokens/s)")
    if len(result.labels) > 1:
        for label, part in sorted(result.labels.items()):
            print(f"  {label:<20}{part.bits_per_byte:.4f} ({size(part.bytes)})")
    print("  by tokens of context before:")
    for first, last, part in result.by_position():
        print(f"  {f'{first:,} to {last - 1:,}':<20}{part.bits_per_byte:.4f} ({size(part.bytes)})")
    return None


def _figures(r: BitsPerByte) -> dict[str, float]:
    return {"bits_per_byte": r.bits_per_byte, "bytes": r.bytes, "tokens": r.tokens, "documents": r.documents}
