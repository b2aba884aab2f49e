"""`run(recipe, overrides)`: the whole road of `hybridlm train`, and of the same command again.

    OUT/recipe.json       what was asked for, with which versions, on which text
    OUT/starts.jsonl      when it was started, on what
    OUT/tokenizer/        trained on the data, or copied in
    OUT/tokens/           token shards (tokens-val/ when validation text is given)
    OUT/checkpoints/      the newest few
    OUT/metrics.jsonl     one object a step
    OUT/hf/               the trained model as transformers and `hybridlm convert` open it
    OUT/result.json       steps, tokens, seconds, bits per byte on held-out text

Each part is written once and taken up when the command runs again, so an interrupted run goes on where it was.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path

import torch

from hybridlm.atomic import atomic_folder, write_file
from hybridlm.data import TokenStream
from hybridlm.errors import ConfigError, DataError
from hybridlm.text import Tokenizer
from hybridlm.train.checkpoint import read_weights
from hybridlm.train.events import Events
from hybridlm.train.faults import Orders
from hybridlm.train.goodput import write_goodput
from hybridlm.train.parallel import Parallel
from hybridlm.train.place import layout_of, pick_device
from hybridlm.train.provenance import note_start, resolve_init, write_recipe
from hybridlm.train.recipe import Recipe
from hybridlm.train.recipes import find, stages_of
from hybridlm.train.stages import run_stages
from hybridlm.train.start import start_shape, starting_model, whole_model
from hybridlm.train.text import prepare
from hybridlm.train.trainer import Trainer
from hybridlm.train.validate import Bits
from hybridlm.train.watchdog import Beat

__all__ = ["run"]


def run(name: str, overrides: Mapping[str, str] | None = None) -> Path:
    """Train recipe `name` with settings replaced, to its end; returns the folder of the run, of stages the last's.

    Raises a `HybridLMError` for what the user can mend. Ctrl-C and SIGTERM save a checkpoint first.
    """
    stages = stages_of(name)
    return run_stages(stages, overrides or {}, _train) if stages else _train(name, overrides)


def _train(name: str, overrides: Mapping[str, str] | None) -> Path:
    """One recipe."""
    began = time.monotonic()
    recipe = find(name).override(overrides or {}).ready()
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    out = Path(recipe.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out: {out} cannot be made ({error.strerror})") from None
    parallel = Parallel.start(layout_of(recipe), pick_device(recipe.device), timeout=recipe.timeout)
    events, beat = Events(out, parallel.rank), Beat.from_environment()
    gpu = torch.cuda.get_device_name(parallel.device) if parallel.device.type == "cuda" else ""
    events.write("start", world=parallel.world, device=gpu or parallel.device.type)
    try:
        with _alone(out) if parallel.is_main else nullcontext():
            given = recipe.init
            if not parallel.is_main:  # the others find the tokens that the first rank has made
                parallel.barrier()
            recipe = resolve_init(recipe, out)
            text = prepare(recipe, out)
            if parallel.is_main:
                parallel.barrier()
            train, val, tokenizer = text.train, text.val, text.tokenizer
            recipe = replace(recipe, model=start_shape(recipe, tokenizer))
            if parallel.is_main:
                write_recipe(recipe, out, unique_tokens=text.unique, init=given)
                note_start(out, world=parallel.world, device=parallel.device)
            model = starting_model(recipe)
            trainer = Trainer(recipe, model, train, val, out, data=text.content, began=began, parallel=parallel,
                              events=events, beat=beat, faults=Orders.from_environment(model, events))
            if parallel.is_main:
                _tell(recipe, trainer, train, val)
            trainer.fit()
            with beat.slow():
                _export(trainer, tokenizer, out)
            if parallel.is_main:
                with suppress(DataError):  # too short to measure
                    write_goodput(out)
    finally:
        parallel.stop()
    return out


def _tell(recipe: Recipe, trainer: Trainer, train: TokenStream, val: TokenStream) -> None:
    model = recipe.model
    length = f"{recipe.seconds:g} s" if recipe.seconds else f"{recipe.steps:,} steps"
    _say(f"{model.num_parameters():,} parameters ({model.num_parameters(embedding=False):,} outside the tables), "
         f"{length} of {recipe.tokens_per_step:,} tokens on {trainer.device}; "
         f"text: {len(train):,} tokens, {len(val):,} held out")
    if len(train) <= recipe.sequence:
        _say(f"data: only {len(train):,} tokens, fewer than a sequence of {recipe.sequence}; "
             "the model will learn them by heart")
    if not len(val):
        _say("data: nothing held out, so no validation; give more documents, or val=PATH")


def _export(trainer: Trainer, tokenizer: Tokenizer, out: Path) -> None:
    """OUT/hf, whole or as it was, and OUT/result.json; all ranks validate, the first writes."""
    bits: dict[str, Bits] = trainer.validate() if len(trainer.val) else {}
    if not trainer.parallel.is_main:
        return
    folder = out / "hf"
    try:
        model = trainer.model if trainer.parallel.world == 1 else whole_model(trainer.recipe.model, read_weights(out))
        with atomic_folder(folder) as aside:
            model.save_pretrained(aside, dtype=getattr(torch, trainer.recipe.export_dtype))
            tokenizer.save(aside)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror}); the checkpoints are untouched, "
                        "make room and run the same command again") from None
    result = {"steps": trainer.step, "tokens": trainer.step * trainer.recipe.tokens_per_step,
              "seconds": round(trainer.elapsed(), 1),
              "val_bits_per_byte": {label: round(b.per_byte, 5) for label, b in bits.items()},
              "val_bytes": {label: b.nbytes for label, b in bits.items()}}
    write_file(out / "result.json", json.dumps(result, indent=1).encode())
    told = ", ".join(f"{label} {b.per_byte:.4f}" for label, b in bits.items())
    _say(f"{trainer.step:,} steps in {trainer.elapsed():.0f} s; bits per byte of held-out text: {told or 'none'}; "
         f"model in {folder}")


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Keep a second process out of the folder; the lock goes with the process, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(out / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"out: another process is training in {out}; wait for it or give another out=") from None
        yield
    finally:
        os.close(handle)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
