"""`Trainer`: the loop. Tokens in, a checkpoint and one record a step out.

The weights and the optimiser are float32; activations are bfloat16 when that is asked for. What a step
trains on is a function of the seed and the step's number, so a checkpoint is weights, moments, generators and a number.
"""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from hybridlm.data import Batch, BatchOrder, TokenStream
from hybridlm.errors import ConfigError, HybridLMError
from hybridlm.model import HybridLM
from hybridlm.ops import linear_cross_entropy
from hybridlm.train import checkpoint
from hybridlm.train.metrics import Metrics
from hybridlm.train.optimizer import adamw, learning_rate
from hybridlm.train.recipe import Recipe
from hybridlm.train.validate import Bits, validate

__all__ = ["Trainer", "pick_device"]

Device = torch.device
# What must not differ between a checkpoint and the recipe that resumes it.
FIXED = ("model", "batch", "sequence", "seed", "mask_documents")


class Trainer:
    """One run. `fit()` resumes from the newest good checkpoint in `out` and trains to the end.

    Args:
        began: `time.monotonic()` of the moment from which `recipe.seconds` counts.
        data: what identifies the tokens; a checkpoint of other tokens is refused.
    """

    def __init__(self, recipe: Recipe, model: HybridLM, train: TokenStream, val: TokenStream, out: Path,
                 *, data: str = "", began: float | None = None) -> None:
        self.recipe, self.out, self.data, self.val = recipe, out, data, val
        self.device = pick_device(recipe.device)
        self.order = BatchOrder(train, recipe.sequence, recipe.batch, recipe.seed)
        self.model = model.to(self.device, torch.float32)
        if recipe.recompute:
            for layer in self.model.model.layers:
                layer.forward = partial(recompute, layer.forward, use_reentrant=False)
        if recipe.dtype == "bfloat16":  # the weights stay float32 and are cast where they are used
            self.model.compute_dtype = torch.bfloat16
            torch.set_float32_matmul_precision("high")
        if recipe.compile:
            self.model.compile_blocks()
        self.optimizer = adamw(self.model, recipe)
        self.step = self.first = 0  # updates behind us; and when this process began
        self.clock = 0.0  # seconds that earlier processes spent on this run
        self.began = time.monotonic() if began is None else began
        self.step_seconds = 0.0  # smoothed

    # -- one step ------------------------------------------------------------------------------------------------

    def train_step(self, batch: Batch) -> dict[str, Any]:
        """One optimiser update. The record's loss and norm are still tensors: the device may not be done."""
        rate = learning_rate(self.recipe, self.step, self.progress())
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = torch.zeros((), device=self.device)
        for part in self.parts(batch):
            share = self.loss(*part) / batch.targets.size
            share.backward()
            loss += share.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return {"step": self.step, "loss": loss, "grad_norm": norm, "lr": rate,
                "tokens": self.step * self.recipe.tokens_per_step}

    def parts(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """The batch in pieces of `microbatch` sequences, on the device."""
        size = self.recipe.microbatch or self.recipe.batch
        for at in range(0, len(batch.inputs), size):
            rows = slice(at, at + size)
            documents = self._to_device(batch.documents[rows]) if self.recipe.mask_documents else None
            yield self._to_device(batch.inputs[rows]), self._to_device(batch.targets[rows]), documents

    def loss(self, inputs: Tensor, targets: Tensor, documents: Tensor | None) -> Tensor:
        """Summed cross-entropy of a piece."""
        hidden = self.model.hidden(inputs, documents=documents)
        return linear_cross_entropy(hidden.flatten(0, 1), self.model.head_weight, targets.flatten(),
                                    self.recipe.z_loss)

    def _to_device(self, array: Any) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    # -- the loop ------------------------------------------------------------------------------------------------

    def fit(self) -> None:
        """Train to the end of the recipe, saving, validating and reporting on the way."""
        self.resume()
        recipe = self.recipe
        total = 0 if recipe.seconds else recipe.steps
        metrics = Metrics(self.out, self.step, total=total, tensorboard=recipe.tensorboard)
        reader = ThreadPoolExecutor(1)
        try:
            with _signals() as asked:
                self._loop(metrics, reader, asked)
        finally:
            reader.shutdown(cancel_futures=True)
            metrics.close()

    def _loop(self, metrics: Metrics, reader: ThreadPoolExecutor, asked: list[int]) -> None:
        recipe = self.recipe
        unread: dict[str, Any] | None = None  # the last step's record, read while the device works on the next
        ahead: Future[Batch] = reader.submit(self.order.at, self.step)
        last, saved = time.monotonic(), self.step
        while not self.finished():
            batch, ahead = ahead.result(), reader.submit(self.order.at, self.step + 1)
            record = self.train_step(batch)
            if unread:
                last = self._log(metrics, unread, last)
            unread = record
            validating = bool(recipe.val_every) and self.step % recipe.val_every == 0 and len(self.val) > 0
            saving = bool(recipe.save_every) and self.step % recipe.save_every == 0
            if validating or saving or asked or self.device.type == "cpu":
                if validating:
                    unread["val_bits_per_byte"] = self.validate(recipe.val_tokens)["all"].per_byte
                last = self._log(metrics, unread, last)
                unread = None
            if saving:
                metrics.sync()
                self.save()
                saved = self.step
                last = time.monotonic()
            if asked:
                break
        if unread:
            self._log(metrics, unread, last)
        if saved != self.step:
            metrics.sync()
            self.save()
        if asked:
            metrics.say(f"stopped at step {self.step} with a checkpoint; the same command goes on from there")
            raise KeyboardInterrupt if asked[0] == signal.SIGINT else SystemExit(128 + asked[0])

    def _log(self, metrics: Metrics, record: dict[str, Any], last: float) -> float:
        """Finish and write a record; returns the time."""
        record["loss"], record["grad_norm"] = float(record["loss"]), float(record["grad_norm"])
        if not (math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"])):
            raise HybridLMError(f"step {record['step']}: the loss is {record['loss']} and the gradient's norm "
                                f"{record['grad_norm']}; the checkpoints before it are good, lower lr and run again")
        now = time.monotonic()
        took = now - last
        if record["step"] > self.first + 1:  # the first step of a process compiles and warms up
            self.step_seconds = 0.9 * self.step_seconds + 0.1 * took if self.step_seconds else took
        record["tokens_per_s"] = round(self.recipe.tokens_per_step / max(took, 1e-9), 1)
        record["seconds"] = round(self.elapsed(), 3)
        metrics.log(record, eta=self.left())
        return now

    # -- how far -------------------------------------------------------------------------------------------------

    def elapsed(self) -> float:
        """Seconds this run has taken, the processes before this one counted."""
        return self.clock + time.monotonic() - self.began

    @property
    def budget(self) -> float:
        """Seconds until the last update, of `recipe.seconds`; the rest is for validation and export."""
        return self.recipe.seconds - max(5.0, 0.04 * self.recipe.seconds)

    def progress(self) -> float:
        """Share of the run behind us."""
        return self.elapsed() / self.budget if self.recipe.seconds else self.step / self.recipe.steps

    def finished(self) -> bool:
        if self.recipe.seconds:
            return self.elapsed() + self.step_seconds > self.budget
        return self.step >= self.recipe.steps

    def left(self) -> float:
        """Seconds until the last update."""
        if self.recipe.seconds:
            return max(0.0, self.budget - self.elapsed())
        return (self.recipe.steps - self.step) * self.step_seconds

    # -- measuring, saving, resuming -----------------------------------------------------------------------------

    def validate(self, limit: int = 0) -> dict[str, Bits]:
        """Bits per byte of the held-out documents, in windows of the training length."""
        rows = self.recipe.microbatch or self.recipe.batch
        self.model.eval()
        # Windows come in many shapes, each of which would be compiled anew.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            bits = validate(self.model.hidden, self.model.head_weight, self.val, sequence=self.recipe.sequence,
                            rows=rows, limit=limit)
        self.model.train()
        return bits

    def save(self) -> None:
        """Write a checkpoint of this step."""
        optimizer = {"optimizer": self.optimizer.state_dict(), "torch": torch.get_rng_state(),
                     "cuda": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else []}
        state = {"step": self.step, "clock": self.elapsed(), "data": self.data, "recipe": self.recipe.to_dict(),
                 "torch": torch.__version__}
        checkpoint.save(self.out / "checkpoints", self.step, self.model.state_dict(), optimizer, state,
                        keep=self.recipe.keep)

    def resume(self) -> None:
        """Take up the newest good checkpoint, if there is one."""
        found = checkpoint.load_newest(self.out / "checkpoints", lambda line: print(line, file=sys.stderr))
        if found is None:
            return
        weights, optimizer, state = found
        before, now = _plain(state["recipe"]), _plain(self.recipe.to_dict())
        for key in FIXED:
            if before.get(key) != now[key]:
                told = "" if key == "model" else f" (it was {before.get(key)}, not {now[key]})"
                raise ConfigError(f"{key}: differs from the run in {self.out}{told}; keep it, or give another out=")
        if state["data"] != self.data:
            raise ConfigError(f"data: the run in {self.out} was trained on other tokens; give another out=")
        self.model.load_state_dict(weights)
        self.optimizer.load_state_dict(optimizer["optimizer"])
        torch.set_rng_state(optimizer["torch"])
        if self.device.type == "cuda" and len(optimizer["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(optimizer["cuda"])
        self.step = self.first = state["step"]
        self.clock = state["clock"]
        print(f"resuming after step {self.step}", file=sys.stderr)


def pick_device(name: str) -> Device:
    """The device of a recipe's word."""
    if name == "auto":
        return Device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = Device(name)
    except RuntimeError:
        raise ConfigError(f"device: {name!r} is none; give auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda is asked for, but PyTorch sees no GPU; give device=cpu")
    return device


def _plain(value: Any) -> Any:
    """The value as JSON gives it back: lists for tuples."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM while inside; a second one acts at once."""
    asked: list[int] = []
    before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def note(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        for n, handler in before.items():
            signal.signal(n, handler)

    if threading.current_thread() is threading.main_thread():
        for number in (int(signal.SIGINT), int(signal.SIGTERM)):
            before[number] = signal.signal(number, note)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
