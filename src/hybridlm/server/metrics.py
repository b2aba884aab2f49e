"""Figures of the server in the text format that Prometheus reads."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hybridlm.server.answer import Answer
    from hybridlm.server.models import Models

__all__ = ["Metrics"]

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Histogram:
    """Counts of durations by upper bound."""

    def __init__(self) -> None:
        self.counts, self.sum = [0] * (len(_SECONDS) + 1), 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(_SECONDS, seconds)] += 1
        self.sum += seconds

    def lines(self, name: str) -> list[str]:
        total, lines = 0, []
        for bound, count in zip((*_SECONDS, "+Inf"), self.counts, strict=True):
            total += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {total}')
        return [*lines, f"{name}_sum {self.sum:.6f}", f"{name}_count {total}"]


class Metrics:
    """Belongs to the event loop's thread."""

    def __init__(self) -> None:
        self.responses: Counter[tuple[str, int]] = Counter()  # by route and status
        self.in_flight = 0
        self.first_token, self.per_token, self.queue = Histogram(), Histogram(), Histogram()

    def observe(self, answer: Answer) -> None:
        """An answer is over."""
        stream = answer.stream
        if stream.first is not None:
            self.first_token.add(stream.first - stream.submitted)
            if len(stream.writer.tokens) > 1 and stream.ended is not None:
                self.per_token.add((stream.ended - stream.first) / (len(stream.writer.tokens) - 1))
        if stream.begun is not None:
            self.queue.add(stream.begun - stream.submitted)

    def text(self, models: Models) -> str:
        lines: list[str] = []

        def family(name: str, kind: str, meaning: str, rows: list[str]) -> None:
            lines.extend([f"# HELP hybridlm_{name} {meaning}", f"# TYPE hybridlm_{name} {kind}", *rows])

        family("http_responses_total", "counter", "Answers by route and status.",
               [f'hybridlm_http_responses_total{{route="{route}",status="{status}"}} {n}'
                for (route, status), n in sorted(self.responses.items())])
        family("http_requests_in_flight", "gauge", "Requests being answered.",
               [f"hybridlm_http_requests_in_flight {self.in_flight}"])
        for name, meaning, histogram in (
                ("time_to_first_token_seconds", "From a request's arrival to its first token.", self.first_token),
                ("time_per_token_seconds", "Between tokens of one output.", self.per_token),
                ("queue_seconds", "From a request's arrival to its beginning.", self.queue)):
            family(name, "histogram", meaning, histogram.lines(f"hybridlm_{name}"))
        loaded = models.open
        for name, kind, meaning, value in (
                ("requests_total", "counter", "Outputs queued.", lambda m: m.scheduler.counters.requests),
                ("requests_refused_total", "counter", "Refused with 429: the queue was full.",
                 lambda m: m.scheduler.counters.refused),
                ("requests_finished_total", "counter", "Come to their end.", lambda m: m.scheduler.counters.finished),
                ("requests_cancelled_total", "counter", "Given up by the client.",
                 lambda m: m.scheduler.counters.cancelled),
                ("requests_timed_out_total", "counter", "Cut by their time limit.",
                 lambda m: m.scheduler.counters.timed_out),
                ("requests_failed_total", "counter", "Ended by an error.", lambda m: m.scheduler.counters.failed),
                ("requests_running", "gauge", "Outputs being read or written.", lambda m: m.scheduler.active),
                ("requests_waiting", "gauge", "Outputs in the queue.", lambda m: m.scheduler.queued),
                ("prompt_tokens_total", "counter", "Of prompts.", lambda m: m.scheduler.counters.prompt_tokens),
                ("prompt_tokens_reused_total", "counter", "Of these, found in the prefix cache.",
                 lambda m: m.scheduler.counters.reused_tokens),
                ("generated_tokens_total", "counter", "Generated.", lambda m: m.scheduler.counters.generated_tokens),
                ("rounds_total", "counter", "Rounds of the scheduler.", lambda m: m.scheduler.counters.rounds),
                ("rows_total", "counter", "Tokens read in them.", lambda m: m.scheduler.counters.rows),
                ("pass_seconds_total", "counter", "Time spent in passes.",
                 lambda m: m.scheduler.counters.pass_seconds),
                ("cache_bytes", "gauge", "Held by the prefix cache.", lambda m: m.engine.cache.nbytes),
                ("cache_budget_bytes", "gauge", "What it may hold.", lambda m: m.engine.cache.budget),
                ("cache_checkpoints", "gauge", "In the prefix cache.", lambda m: len(m.engine.cache)),
                ("cache_evictions_total", "counter", "Checkpoints let go.", lambda m: m.engine.cache.stats.evicted),
                ("cache_disk_bytes", "gauge", "Of the prefix cache's files.",
                 lambda m: m.engine.cache.disk.nbytes if m.engine.cache.disk else 0),
                ("cache_disk_checkpoints", "gauge", "In them.",
                 lambda m: len(m.engine.cache.disk) if m.engine.cache.disk else 0),
                ("cache_spilled_total", "counter", "Checkpoints written to the disk.",
                 lambda m: m.engine.cache.stats.spilled),
                ("cache_reloaded_total", "counter", "Checkpoints read from it.",
                 lambda m: m.engine.cache.stats.reloaded),
                ("model_bytes", "gauge", "Of the model's file.", lambda m: m.engine.model_bytes)):
            family(name, kind, meaning, [f'hybridlm_{name}{{model="{_escaped(m.name)}"}} {value(m)}' for m in loaded])
        return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
