"""`hybridlm plan`: memory, days, cost and checkpoints of a training run, before any GPU is rented."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated

import typer

from hybridlm.cli._common import JsonOption, print_json
from hybridlm.config import HybridConfig
from hybridlm.plan import Cluster, Layout, find_gpu, make_plan
from hybridlm.plan.run import GPU_MTBF_HOURS


def command(
    preset: Annotated[str, typer.Option("--preset", help="tiny, 60m ... 1b, 7b, one with -twin, or a folder with "
                                                         "config.json.")] = "7b",
    gpus: Annotated[int, typer.Option("--gpus", min=1)] = 8,
    tokens: Annotated[float, typer.Option("--tokens", help="Of the whole run: 3e12.")] = 1e11,
    gpu: Annotated[str, typer.Option("--gpu", help="a100, h100, h200 or b200.")] = "h100",
    sequence: Annotated[int, typer.Option("--sequence", help="Tokens a sequence.")] = 8192,
    batch_tokens: Annotated[float, typer.Option("--batch-tokens", help="Tokens a step, over all GPUs.")] = 4_194_304,
    layout: Annotated[str, typer.Option("--layout", help="dp_replicate=4,dp_shard=128,tp=1,cp=1; chosen when left "
                                                         "out.")] = "",
    microbatch: Annotated[int, typer.Option("--microbatch", min=0, help="Sequences a GPU takes at a time.")] = 0,
    recompute: Annotated[float | None, typer.Option("--recompute", min=0, max=1, help="Share of layers whose "
                                                    "activations are computed again.")] = None,
    optimizer: Annotated[str, typer.Option("--optimizer", help="adamw or muon.")] = "adamw",
    mfu: Annotated[float, typer.Option("--mfu", min=0, max=1, help="Share of the peak, 0.4; as measured when left "
                                                                   "out.")] = 0.0,
    mtbf: Annotated[float, typer.Option("--mtbf", min=0, help="Hours between failures of one GPU; 0: none ever.")] =
        GPU_MTBF_HOURS,
    detect: Annotated[float, typer.Option("--detect", min=0, help="Seconds until a failure is noticed.")] = 60.0,
    restart: Annotated[float, typer.Option("--restart", min=0, help="Seconds from then to training again.")] = 120.0,
    save_every: Annotated[float, typer.Option("--save-every", min=0, help="Seconds between checkpoints; the best when "
                                                                          "left out.")] = 0.0,
    price: Annotated[float, typer.Option("--price", min=0, help="Of a GPU and hour, in any currency.")] = 0.0,
    published: Annotated[bool, typer.Option("--published", help="The published run of Olmo Hybrid 7B beside its "
                                                                "plan.")] = False,
    measured: Annotated[Path | None, typer.Option("--measured", metavar="RUN", help="A run that happened beside what "
                                                  "is simulated for it.")] = None,
    json: JsonOption = False,
) -> None:
    """Plan a training run: memory by part for each layout, days, cost, checkpoints, goodput. Needs no GPU.

    hybridlm plan --preset 1b --gpus 8 --gpu h100 --tokens 26e9 --batch-tokens 524288 --price 2.5
    """
    from hybridlm.plan import text

    if published:
        return _published(json)
    if measured:
        return _measured(measured, json)
    cluster = Cluster(find_gpu(gpu), gpus, mtbf, detect, restart, price=price)
    plan = make_plan(_config(preset), cluster, tokens, sequence=sequence, batch_tokens=batch_tokens,
                     layout=_layout(layout) if layout else None, microbatch=microbatch, recompute=recompute, mfu=mfu,
                     interval=save_every, optimizer=optimizer)
    print_json(text.as_data(plan)) if json else print(text.tell(plan, preset))
    return None


def _published(json: bool) -> None:
    from hybridlm.plan import text
    from hybridlm.plan.published import compare

    ours, theirs, rows, why = compare()
    if json:
        return print_json({"ours": text.as_data(ours), "theirs": text.as_data(theirs), "rows": rows, "why": why})
    print("Olmo Hybrid 7B, 3T tokens on 512 B200: what was published, and this plan with two speeds\n")
    print(text.table(("", "published", "our MFU", "their MFU"), rows))
    print("\n" + "\n".join(f"- {line}" for line in why))
    print("\nAssumed:\n" + "\n".join(f"- {line}" for line in ours.assumptions))
    return None


def _measured(run: Path, json: bool) -> None:
    from hybridlm.plan import text
    from hybridlm.plan.measured import faults_of, predict, read_goodput

    figures = read_goodput(run)
    outcome, again = predict(figures)
    rows = [("active share", f"{figures['active']:.1%}", f"{outcome.goodput:.1%}"),
            ("work done again", f"{again:.1f} s", f"{outcome.replayed:.1f} s")]
    if json:
        return print_json({"measured": figures, "faults": asdict(faults_of(figures)), "predicted": asdict(outcome)})
    print(text.table(("", "measured", "predicted"), rows))
    return None


def _config(name: str) -> HybridConfig:
    return HybridConfig.from_pretrained(name) if Path(name).exists() else HybridConfig.preset(name)


def _layout(given: str) -> Layout:
    known = [f.name for f in fields(Layout)]
    values: dict[str, int] = {}
    for part in given.replace(" ", ",").split(","):
        key, _, value = part.partition("=")
        if key not in known or not value.isdigit():
            raise typer.BadParameter(f"{part!r} is not one of {', '.join(f'{k}=N' for k in known)}",
                                     param_hint="--layout")
        values[key] = int(value)
    return Layout(**values)
