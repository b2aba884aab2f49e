"""Trains through faults, and holds the result against a run that was left alone: `make faults MINUTES=60 EVERY=60`.

Two runs of the same steps on as many processes: one undisturbed with checkpoints off, one with checkpoints and with a
fault of a random kind about every EVERY seconds (at least 60% of them processes killed, frozen, or lost with their
agent). Told is: whether the curves are bitwise equal, whether every checkpoint reads, whether flipped bits were traced
to their rank, how long recovery took, and goodput: undisturbed over faulted wall time. The text is made on the spot.

With --cores and --reference-cores the runs go side by side on disjoint cores, else one after the other. --only and
--calm let one undisturbed run serve several seeds, and judge what has been done so far while runs go on.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from hybridlm.train.checkpoint import fault_of, find, read_weights
from hybridlm.train.events import read_events
from hybridlm.train.faults import BAD_BATCHES, KILLING, KINDS, Fault, make_plan, write_plan
from hybridlm.train.goodput import goodput

RECIPE = """
from hybridlm.config import FULL, LINEAR, HybridConfig, Rope
from hybridlm.train import Recipe

def recipe():
    model = HybridConfig(vocab_size=2048, hidden_size={hidden}, intermediate_size={wide}, num_attention_heads=4,
                         layer_types=(LINEAR, LINEAR, LINEAR, FULL) * {blocks}, rope=Rope(1e4),
                         tie_word_embeddings=True, max_position_embeddings=1024)
    return Recipe(model=model, vocab=2000, batch={batch}, sequence={sequence}, warmup=20, lr=2e-3, val_every=0,
                  tensorboard=False, threads=1, device="cpu", keep=3)
"""
SIZES = {  # the first has 5.6M weights; the second is for a quick look
    "small": {"hidden": 256, "wide": 640, "blocks": 2, "batch": 8, "sequence": 64},
    "micro": {"hidden": 32, "wide": 64, "blocks": 1, "batch": 8, "sequence": 32},
}


def main() -> None:
    a = arguments()
    out = Path(a.out)
    out.mkdir(parents=True, exist_ok=True)
    recipe, text = out / "recipe.py", out / "text.jsonl"
    recipe.write_text(RECIPE.format(**SIZES[a.size]))
    if not text.exists():  # a text written again is another source to a run that restarts meanwhile
        documents = 3000 if a.size == "small" else 60
        text.write_text("".join(json.dumps({"text": prose(i)}) + "\n" for i in range(documents)))
    steps, step_seconds = a.steps, a.step_seconds
    if not steps:
        step_seconds = step_seconds or calibrate(a, recipe, text, out / "calibration")
        steps = int(a.minutes * 60 * a.expect / step_seconds)
    kinds = {k.split(":")[0]: int(k.split(":")[1]) for k in a.kinds.split(",")} if a.kinds else KINDS
    plan = make_plan(a.seed, seconds=a.minutes * 60, every=a.every, kinds=kinds)
    if a.at_steps:
        plan = [Fault(0.0, k, 0.6, step=int(s)) for k, s in zip(kinds, a.at_steps.split(","), strict=True)]
    step_seconds = step_seconds or a.minutes * 60 / steps
    bad = sorted({int(f.at * a.expect / step_seconds) for f in plan if f.kind == "nan"} - {0})
    if a.bad_batches:
        bad = [int(s) for s in a.bad_batches.split(",")]
    if not (out / "plan.json").exists():
        write_plan(out / "plan.json", [f for f in plan if f.kind != "nan"])
    common = [str(recipe), f"data={text}", f"steps={steps}"]
    calm = Run(Path(a.calm) if a.calm else out / "calm", [*common, "save_every=0"], a, a.reference_cores, bad)
    faulted = Run(out / "faulted", [*common, f"save_every={a.save_every}", "--faults", str(out / "plan.json")], a,
                  a.cores, bad)
    say(f"{steps} steps, about {step_seconds:.2f} s each; {len(plan)} faults, bad batches at {bad or 'none'}")
    runs = [r for r, name in ((calm, "calm"), (faulted, "faulted")) if a.only in ("", name)]
    if a.cores and a.reference_cores:
        threads = [threading.Thread(target=r.go) for r in runs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    else:
        for run in runs:
            run.go()
    if a.only in ("calm", "faulted"):
        return
    result = judge(calm, faulted, a)
    (out / "result.json").write_text(json.dumps(result, indent=1))
    show(result)
    sys.exit(0 if result["good"] else 1)


class Run:
    """One run, started again whenever it was asked to leave."""

    def __init__(self, out: Path, words: list[str], a: argparse.Namespace, cores: str, bad: list[int]) -> None:
        self.out, self.code, self.launches, self.wall = out, -1, 0, 0.0
        self.command = [sys.executable, "-m", "hybridlm.cli", "train", *words, f"out={out}", "--nproc", str(a.nproc),
                        "--nnodes", a.nnodes]
        self.cores = {int(c) for c in cores.split(",") if c}
        self.limit = a.limit
        self.environment = {**os.environ, BAD_BATCHES: ",".join(map(str, bad)), "TOKENIZERS_PARALLELISM": "false"}

    def go(self) -> None:
        began = time.time()
        log = self.out.with_suffix(".log").open("ab")
        pin = (lambda: os.sched_setaffinity(0, self.cores)) if self.cores else None
        while True:
            self.launches += 1
            left = self.limit - (time.time() - began) if self.limit else None
            process = subprocess.Popen(self.command, stdout=log, stderr=log, env=self.environment, preexec_fn=pin)
            try:
                self.code = process.wait(left)
            except subprocess.TimeoutExpired:
                process.terminate()
                self.code = process.wait()
                break
            if self.code != 143:
                break
        self.wall = time.time() - began

    def curve(self) -> dict[int, str]:
        """The loss of each step, as written."""
        rows = [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]
        return {row["step"]: repr(row["loss"]) for row in rows}

    def seconds(self, steps: int) -> float:
        """From the first launch to the end of a step, tokenising and starting included."""
        events = read_events(self.out)
        begun = next(e["time"] for e in events if e["kind"] == "launch")
        return next(e["time"] for e in events if e["kind"] == "step_new" and e["step"] == steps) - begun


def judge(calm: Run, faulted: Run, a: argparse.Namespace) -> dict[str, Any]:
    """Everything that is to hold, from what the two runs left on the disk."""
    events = read_events(faulted.out)
    faults = [e for e in events if e["kind"] == "fault"]
    left, right = calm.curve(), faulted.curve()
    both = sorted(set(left) & set(right))
    differing = [s for s in both if left[s] != right[s]]
    harmed = {e["path"] for e in faults if "path" in e}
    unreadable = [e["path"] for e in events if e["kind"] == "checkpoint_damaged" and e["path"] not in harmed]
    for path in find(faulted.out / "checkpoints"):
        fault = fault_of(path)
        if fault and path.name not in harmed:
            unreadable.append(path.name)
        elif not fault:
            read_weights(path)
    flips = [e for e in faults if e["what"] == "flip"]
    traced = sum(any(d["kind"] == "diverged" and d["time"] > f["time"] and d["ranks"] == [f["rank"]] for d in events)
                 for f in flips)
    figures = goodput(faulted.out)
    counts = {kind: sum(e["what"] == kind for e in faults) for kind in KINDS}
    times = {kind: [r["seconds"] for r in figures["recoveries"] if r["what"] == kind and r["seconds"] is not None]
             for kind in KINDS}
    steps = both[-1] if both else 0
    result = {
        "steps": steps, "world": f"{a.nproc} x {a.nnodes}", "faults": counts, "seed": a.seed, "every": a.every,
        "killing_share": round(sum(counts[k] for k in KILLING) / max(1, len(faults)), 3),
        "curve_equal": bool(both) and not differing and (set(left) == set(right) or bool(a.limit)),
        "first_difference": differing[0] if differing else None, "unreadable": unreadable,
        "flips": len(flips), "flips_traced": traced, "calm_seconds": round(calm.seconds(steps), 1),
        "faulted_seconds": round(faulted.seconds(steps), 1),
        "goodput": round(calm.seconds(steps) / faulted.seconds(steps), 4),
        "recovery_by_kind": {k: round(statistics.median(t), 2) for k, t in times.items() if t},
        "codes": [calm.code, faulted.code], "launches": faulted.launches,
        **{k: figures[k] for k in ("step_seconds", "active", "restarts", "steps_lost", "recovery", "checkpoints",
                                   "skipped")},
    }
    result["good"] = bool(result["curve_equal"] and not unreadable and traced == len(flips) and figures["recoveries"])
    return result


def show(result: dict[str, Any]) -> None:
    recovery, checkpoints = result["recovery"], result["checkpoints"]
    rows = [
        ("steps, processes", f"{result['steps']}, {result['world']}, {result['step_seconds']:.3f} s a step"),
        ("faults", ", ".join(f"{n} {k}" for k, n in result["faults"].items() if n)),
        ("processes lost, of all faults", f"{result['killing_share']:.0%}"),
        ("curve bitwise that of the calm run", "yes" if result["curve_equal"] else
         f"NO, from step {result['first_difference']}"),
        ("checkpoints unreadable", str(len(result["unreadable"]))),
        ("flipped bits traced to their rank", f"{result['flips_traced']} of {result['flips']}"),
        ("recovery", f"median {recovery['median']} s, p95 {recovery['p95']} s, longest {recovery['longest']} s"),
        ("recovery by kind", ", ".join(f"{k} {s}" for k, s in result["recovery_by_kind"].items())),
        ("goodput", f"{result['goodput']:.1%} ({result['calm_seconds']} s / {result['faulted_seconds']} s)"),
        ("restarts, steps done again", f"{result['restarts']}, {result['steps_lost']}"),
        ("checkpoints", f"{checkpoints['count']}, {checkpoints['stall_share']:.2%} of the time waited for them, "
                        f"{checkpoints['write_seconds']} s to write one"),
    ]
    for name, value in rows:
        say(f"{name:36} {value}")


def calibrate(a: argparse.Namespace, recipe: Path, text: Path, out: Path) -> float:
    """Seconds a step, undisturbed."""
    run = Run(out, [str(recipe), f"data={text}", "steps=24", "save_every=0"], a, a.cores, [])
    run.go()
    if run.code:
        sys.exit(f"the calibration ended with {run.code}; see {out.with_suffix('.log')}")
    return float(goodput(out)["step_seconds"])


def prose(seed: int) -> str:
    """Sentences of made-up words, a few of which are frequent."""
    rng = random.Random(seed)
    words = ["".join(random.Random(i).choices("aeioulnrstdm", k=2 + i % 7)) for i in range(400)]
    return "".join(words[int(rng.paretovariate(0.7)) % 400] + rng.choice([" ", " ", " ", ", ", ".\n"])
                   for _ in range(200))


def say(line: str) -> None:
    print(line, flush=True)


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--minutes", type=float, default=60)
    p.add_argument("--every", type=float, default=60, help="seconds from fault to fault")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--nproc", type=int, default=2, help="ranks of each agent")
    p.add_argument("--nnodes", default="2", help="agents")
    p.add_argument("--size", default="small", choices=list(SIZES))
    p.add_argument("--save-every", type=int, default=5)
    p.add_argument("--steps", type=int, default=0, help="instead of as many as fit into the minutes")
    p.add_argument("--step-seconds", type=float, default=0, help="instead of measuring it")
    p.add_argument("--expect", type=float, default=0.85, help="goodput that the number of steps is planned with")
    p.add_argument("--kinds", default="", help="kind:count,... instead of the usual mix")
    p.add_argument("--at-steps", default="", help="40,90: one of each of --kinds, at these steps")
    p.add_argument("--cores", default="", help="0,1: cores for the faulted run")
    p.add_argument("--reference-cores", default="", help="2,3: cores for the undisturbed run, beside the other")
    p.add_argument("--bad-batches", default="", help="40,97: steps, instead of the plan's share")
    p.add_argument("--only", default="", choices=["", "calm", "faulted", "judge"], help="one part of it")
    p.add_argument("--calm", default="", help="folder of an undisturbed run to hold against")
    p.add_argument("--limit", type=float, default=0, help="seconds after which both runs end wherever they are")
    p.add_argument("--out", default="runs/faults")
    a = p.parse_args()
    a.kinds = ",".join(k if ":" in k else f"{k}:1" for k in a.kinds.split(",") if k)
    return a


if __name__ == "__main__":
    main()
