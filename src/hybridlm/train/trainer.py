"""`Trainer`: the loop. Tokens in, a checkpoint and one record a step out, on one process or many.

The weights and the optimiser are float32; activations are bfloat16 when that is asked for. What a step trains on is a
function of the seed and the step's number, so a checkpoint is weights, moments, generators and a number. Every rank
runs this same loop; what they share goes through `Parallel`, and what is logged is the sum over all of them.
"""

from __future__ import annotations

import base64
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hybridlm.data import Batch, TokenStream, order_of
from hybridlm.errors import ConfigError, HybridLMError
from hybridlm.model import HybridLM
from hybridlm.ops import linear_cross_entropy
from hybridlm.train.checkpoint import Checkpoints
from hybridlm.train.events import Events
from hybridlm.train.faults import Orders
from hybridlm.train.guard import PATIENCE, Guard
from hybridlm.train.metrics import Metrics
from hybridlm.train.optimizer import HybridOptimizer
from hybridlm.train.parallel import Parallel
from hybridlm.train.place import layout_of, pick_device
from hybridlm.train.recipe import Recipe
from hybridlm.train.schedule import decay_ends, learning_rate
from hybridlm.train.stopping import asked_to_stop
from hybridlm.train.validate import Bits, validate
from hybridlm.train.watchdog import Beat

__all__ = ["Trainer"]


class Trainer:
    """One run. `fit()` resumes from the newest good checkpoint in `out` and trains to the end.

    Args:
        began: `time.monotonic()` of the moment from which `recipe.seconds` counts.
        data: what identifies the tokens; a checkpoint of other tokens is refused.
        parallel: the processes that train together; started for `recipe` when not given.
        events: where what happens to the run is written.
        beat: told of each step, so that a launcher sees that the process gets on.
        faults: what to do to oneself, where that is being tested.
    """

    def __init__(self, recipe: Recipe, model: HybridLM, train: TokenStream, val: TokenStream, out: Path,
                 *, data: str = "", began: float | None = None, parallel: Parallel | None = None,
                 events: Events | None = None, beat: Beat | None = None, faults: Orders | None = None) -> None:
        self.recipe, self.out, self.data, self.val = recipe, out, data, val
        self.events, self.beat, self.faults = events, beat or Beat(None, 0), faults
        self.parallel = parallel or Parallel.start(layout_of(recipe), pick_device(recipe.device),
                                                   timeout=recipe.timeout)
        self.device = self.parallel.device
        self.order = order_of(train, recipe.packing, recipe.sequence, recipe.batch, recipe.seed, recipe.repetition)
        if recipe.batch % self.parallel.data_world:
            raise ConfigError(f"batch: {recipe.batch} sequences do not divide among {self.parallel.data_world} "
                              "processes; give a multiple of them")
        if recipe.sequence % self.parallel.row_ranks:
            raise ConfigError(f"sequence: {recipe.sequence} tokens do not divide among tp x cp = "
                              f"{self.parallel.row_ranks} ranks; give a multiple of it")
        self.model = model.to(self.device, torch.float32)
        bf16 = recipe.dtype == "bfloat16"  # the weights stay float32 and are cast where they are used
        if bf16:
            torch.set_float32_matmul_precision("high")
        self.parallel.apply(self.model, compute_dtype=torch.bfloat16 if bf16 else None, recompute=recipe.recompute,
                            compile=recipe.compile)
        self.optimizer = HybridOptimizer(self.model, recipe)
        self.guard = Guard(recipe.skip_window, recipe.skip_sigma, self.device)
        self.decay_ends = set(decay_ends(recipe))
        self.step = self.first = 0  # updates behind us; and when this process began
        self.clock = 0.0  # seconds that earlier processes spent on this run
        self.began = time.monotonic() if began is None else began
        self.step_seconds = 0.0  # smoothed

    # -- one step ------------------------------------------------------------------------------------------------

    def train_step(self, batch: Batch) -> dict[str, Any]:
        """One optimiser update from this rank's part of the batch. The record's figures are still tensors, those of all
        ranks together: the device may not be done."""
        rate = learning_rate(self.recipe, self.step, self.progress())
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        count = self.parallel.sum_rows(self._to_device(np.array(batch.counted, np.float32)))
        loss = torch.zeros((), device=self.device)
        pieces = list(self.parts(batch))
        for i, piece in enumerate(pieces):
            with self.parallel.accumulate(self.model, last=i == len(pieces) - 1):
                share = self.loss(*piece) / count
                share.backward()
            loss += share.detach()
        loss = self.parallel.sum(loss)
        norm = self.parallel.clip(self.model.parameters(), self.recipe.clip)
        skip = self.guard.judge(loss, norm)
        if self.parallel.world > 1:  # rounding may differ between ranks, the decision must not
            skip = self.parallel.sum(skip).clamp_max(1)
        self.optimizer.step(skip)
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return {"step": self.step, "loss": loss, "grad_norm": norm, "lr": rate,
                "tokens": self.step * self.recipe.tokens_per_step, "skipped": skip, "in_a_row": self.guard.in_a_row}

    def parts(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """The batch in pieces of `microbatch` sequences, on the device."""
        size = self.recipe.microbatch or self.recipe.batch
        documents = batch.documents if self.recipe.mask_documents else None
        for at in range(0, len(batch.inputs), size):
            rows = slice(at, at + size)
            yield (self._to_device(batch.inputs[rows]), self._to_device(batch.targets[rows]),
                   None if documents is None else self._to_device(documents[rows]))

    def loss(self, inputs: Tensor, targets: Tensor, documents: Tensor | None) -> Tensor:
        """Summed cross-entropy of a piece."""
        hidden = self.model.hidden(inputs, documents=documents)
        return linear_cross_entropy(hidden.flatten(0, 1), self.model.head_weight, self.parallel.mine(targets).flatten(),
                                    self.recipe.z_loss)

    def _to_device(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    # -- the loop ------------------------------------------------------------------------------------------------

    def fit(self) -> None:
        """Train to the end of the recipe, saving, validating and reporting on the way."""
        recipe, main = self.recipe, self.parallel.is_main
        self.checkpoints = Checkpoints(self.out / "checkpoints", self.parallel, keep=recipe.keep,
                                       permanent_every=recipe.permanent_every, tell=self._tell,
                                       disturb=self._disturb)
        with self.beat.slow():
            self.resume()
        metrics = Metrics(self.out, self.step, recipe) if main else None
        reader = ThreadPoolExecutor(1)
        try:
            with asked_to_stop() as asked:
                self._loop(metrics, reader, asked)
        finally:
            reader.shutdown(cancel_futures=True)
            if metrics:
                metrics.close()

    def _loop(self, metrics: Metrics | None, reader: ThreadPoolExecutor, asked: list[int]) -> None:
        recipe, parallel = self.recipe, self.parallel
        unread: dict[str, Any] | None = None  # the last step's record, read while the device works on the next
        ahead: Future[Batch] = reader.submit(self._batch, self.step)
        self.last, saved = time.monotonic(), self.step
        while not parallel.agree(self.finished() or bool(asked)):
            if self.faults:
                self.faults.at(self.step, "step")
            batch, ahead = ahead.result(), reader.submit(self._batch, self.step + 1)
            record = self.train_step(batch)
            if unread:
                self._log(metrics, unread)
            unread = record
            validating = len(self.val) > 0 and bool(recipe.val_every) and (
                self.step % recipe.val_every == 0 or self.step in self.decay_ends)
            saving = bool(recipe.save_every) and self.step % recipe.save_every == 0
            if validating or saving or asked or self.device.type == "cpu":
                if validating:
                    unread["val_bits_per_byte"] = self.validate(recipe.val_tokens)["all"].per_byte
                self._log(metrics, unread)
                unread = None
            if saving:
                self.save(metrics)
                saved, self.last = self.step, time.monotonic()
            self.beat.beat(self.step)
        if unread:
            self._log(metrics, unread)
        if saved != self.step:
            self.save(metrics)
        self.checkpoints.finish()
        self._tell("stop", step=self.step, asked=bool(asked))
        if not self.finished():
            if metrics:
                metrics.say(f"stopped at step {self.step} with a checkpoint; the same command goes on from there")
            number = asked[0] if asked else signal.SIGTERM  # another rank was asked
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    def _batch(self, step: int) -> Batch:
        return self.order.at(step, self.parallel.data_rank, self.parallel.data_world)

    def _log(self, metrics: Metrics | None, record: dict[str, Any]) -> None:
        """Finish and write a record."""
        record["loss"], record["grad_norm"] = float(record["loss"]), float(record["grad_norm"])
        skipped, in_a_row = bool(record.pop("skipped")), int(record.pop("in_a_row"))
        if skipped:
            record["skipped"] = 1
            self._tell("skip", step=record["step"], loss=str(record["loss"]), grad_norm=str(record["grad_norm"]))
        if in_a_row >= PATIENCE:
            raise HybridLMError(f"step {record['step']}: the loss is {record['loss']} and the gradient's norm "
                                f"{record['grad_norm']}, out of line for {in_a_row} steps in a row, whose updates were "
                                "left out; the checkpoints before them are good, lower lr and run again")
        now = time.monotonic()
        took = now - self.last
        if record["step"] > self.first + 1:  # the first step of a process compiles and warms up
            self.step_seconds = 0.9 * self.step_seconds + 0.1 * took if self.step_seconds else took
        record["tokens_per_s"] = round(self.recipe.tokens_per_step / max(took, 1e-9), 1)
        record["seconds"] = round(self.elapsed(), 3)
        if self.events and self.parallel.is_main:
            self.events.step(record["step"])
        if metrics:
            metrics.log(record, eta=self.left())
        self.last = now

    def _tell(self, kind: str, **fields: Any) -> None:
        if self.events:
            self.events.write(kind, **fields)

    def _disturb(self, step: int, folder: Path) -> None:
        if self.faults:
            self.faults.at(step, "save", folder=folder)

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
        """Bits per byte of the held-out documents, in windows of the training length; the ranks share them out."""
        rows = self.recipe.microbatch or self.recipe.batch
        self.model.eval()
        # Windows come in many shapes, each of which would be compiled anew.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), self.beat.slow():
            bits = validate(self.model.hidden, lambda: self.model.head_weight, self.val, sequence=self.recipe.sequence,
                            rows=rows, limit=limit, rank=self.parallel.data_rank, world=self.parallel.data_world,
                            together=self.parallel.sum, mine=self.parallel.mine, multiple=self.parallel.row_ranks)
        self.parallel.settle(self.model)
        self.model.train()
        return bits

    def save(self, metrics: Metrics | None = None) -> None:
        """Write a checkpoint of this step; the writing goes on beside the next steps."""
        if metrics:
            metrics.sync()
        generators = [torch.get_rng_state()]
        if self.device.type == "cuda":
            generators.append(torch.cuda.get_rng_state(self.device))
        state = {"step": self.step, "clock": self.elapsed(), "data": self.data, "recipe": self.recipe.to_dict(),
                 "torch": torch.__version__, "guard": self.guard.state(),
                 "generators": [base64.b64encode(g.numpy().tobytes()).decode() for g in generators]}
        self.checkpoints.save(self.step, self.model, self.optimizer, state)

    def resume(self) -> None:
        """Take up the newest good checkpoint, if there is one."""
        told = (lambda line: print(line, file=sys.stderr)) if self.parallel.is_main else (lambda line: None)
        state = self.checkpoints.load_newest(self.model, self.optimizer, told, check=self._accept)
        if state is None:
            if self.recipe.moments:
                self.checkpoints.load(self.recipe.init, self.model, self.optimizer)
            return
        self.guard.load(state["guard"])
        generators = [torch.frombuffer(bytearray(base64.b64decode(g)), dtype=torch.uint8)
                      for g in state["generators"]]
        torch.set_rng_state(generators[0])
        if self.device.type == "cuda" and len(generators) > 1:
            torch.cuda.set_rng_state(generators[1], self.device)
        self.step = self.first = state["step"]
        self.clock = state["clock"]
        self._tell("resumed", step=self.step, world=self.parallel.world)
        told(f"resuming after step {self.step}")

    def _accept(self, state: dict[str, Any]) -> None:
        """Refuse the checkpoint of another run."""
        self.recipe.continues(state["recipe"], self.out)
        if state["data"] != self.data:
            raise ConfigError(f"data: the run in {self.out} was trained on other tokens; give another out=")
