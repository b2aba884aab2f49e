"""The scheduler: outputs as if each ran alone, fair order, bounds, ends of every kind."""

import asyncio
import threading
import time

import numpy as np
import pytest
from tests.engine.helpers import reference_engine, small_config
from tests.engine.test_generate import text_engine

from hybridlm.engine import Engine, Sampler
from hybridlm.engine.scheduler import Closed, FairClock, QueueFull, Scheduler, TimedOut
from hybridlm.engine.writer import Writer
from hybridlm.errors import HybridLMError


def writer(engine, prompt, max_tokens=8, **options):
    sampling = {k: options.pop(k) for k in ("temperature", "seed", "top_p", "repetition_penalty", "frequency_penalty",
                                            "presence_penalty") if k in options}
    return Writer(engine, engine.encode(prompt), Sampler(**{"temperature": 0, **sampling}), max_tokens=max_tokens,
                  **options)


def alone(engine, prompt, step=256, **options):
    """The same output made by itself."""
    w = writer(engine, prompt, **options)
    w.step = step
    session = w.begin()
    while tokens := w.slice():
        session.feed(tokens)
        w.keep()
    while (piece := w.write(session.logits())).finish is None:
        session.feed([piece.token])
    return w.tokens, w.text, w.finish_reason


@pytest.fixture
def scheduled():
    """`scheduled(engine, **options)` -> a scheduler that is closed afterwards."""
    made = []

    def make(engine, **options):
        made.append(Scheduler(engine, **options))
        return made[-1]

    yield make
    for scheduler in made:
        scheduler.close()


def random_jobs(rng, vocab, count):
    jobs = []
    for i in range(count):
        length = int(rng.choice([1, 5, 63, 64, 65, 200, 600]))
        options = {"max_tokens": int(rng.integers(1, 20))}
        if i % 3 == 1:
            options |= {"temperature": 0.8, "seed": i, "top_p": 0.9, "frequency_penalty": 0.5}
        if i % 4 == 2:
            options["checkpoints"] = (length // 2,)
        jobs.append((rng.integers(0, vocab, length).tolist(), options))
    return jobs


def check_as_alone(make_engine, scheduled, vocab, count, **options):
    jobs = random_jobs(np.random.default_rng(3), vocab, count)
    engine = make_engine()
    expected = [alone(engine, prompt, options.get("step", 256), **o) for prompt, o in jobs]
    scheduler = scheduled(make_engine(), **options)
    streams = []
    for i, (prompt, o) in enumerate(jobs):
        streams.append(scheduler.submit(writer(scheduler.engine, prompt, **o)))
        if i % 5 == 0:
            time.sleep(0.01)
    for stream, want in zip(streams, expected, strict=True):
        pieces = list(stream)
        got = stream.writer
        assert (got.tokens, got.text, got.finish_reason) == want
        assert "".join(p.text for p in pieces) == got.text and pieces[-1].finish == got.finish_reason
        assert stream.submitted <= stream.begun <= stream.first <= stream.ended
    c = scheduler.counters
    assert c.requests == c.finished == count and c.failed == c.cancelled == 0
    assert c.prompt_tokens == sum(len(p) for p, _ in jobs)
    assert c.generated_tokens == sum(len(t) for t, _, _ in expected) and c.rounds > 0
    assert scheduler.active == scheduler.queued == scheduler._held_bytes == 0


@pytest.mark.parametrize("options", [{}, {"running": 3}, {"step": 64, "round_seconds": 0.0}, {"state_bytes": 1}])
def test_outputs_are_those_of_each_alone(scheduled, options):
    check_as_alone(lambda: text_engine(), scheduled, 300, 16, **options)


def test_on_the_cpu_with_8_bit_activations_every_bit_is_the_same(scheduled, tmp_path):
    """Rows are quantised one by one, and slices depend on the prompt alone: no tolerance is needed."""
    from tests.cli.micro import write_micro

    from hybridlm.formats.convert import convert

    convert(write_micro(tmp_path / "m", max_position_embeddings=1024), tmp_path / "m.gguf", "q8_0")
    opened = []

    def make():
        opened.append(Engine.open(tmp_path / "m.gguf", checkpoint_every=128))
        return opened[-1]

    check_as_alone(make, scheduled, 400, 24)
    check_as_alone(make, scheduled, 400, 24, step=64)
    for engine in opened:
        engine.close()


def test_how_a_prompt_is_cut_depends_on_the_prompt_alone():
    engine = text_engine(checkpoint_every=100)
    for step, cuts in ((64, [64, 70, 100, 128, 192, 200, 256, 300, 320, 360]), (256, [70, 100, 200, 256, 300, 360])):
        w = writer(engine, list(range(90)) * 4, checkpoints=(70,))
        w.step = step
        session, ends = w.begin(), []
        while tokens := w.slice():
            session.state.tokens += tokens  # as if read
            ends.append(session.position)
        assert ends == cuts


def test_two_with_one_beginning_read_it_once(scheduled):
    scheduler = scheduled(text_engine())
    shared = list(range(256)) * 2
    streams = [scheduler.submit(writer(scheduler.engine, [*shared, i, i + 1])) for i in range(4)]
    for stream in streams:
        list(stream)
    reused = sorted(s.writer.reused_tokens for s in streams)
    assert reused[0] == 0 and min(reused[1:]) >= 512 - 256  # what saves less than a slice is not waited for


def test_a_long_prompt_does_not_stall_who_writes(scheduled):
    engine = text_engine(cache_bytes=0)
    scheduler = scheduled(engine, round_seconds=0.0, step=64)
    first = scheduler.submit(writer(engine, [1, 2, 3], max_tokens=200))
    pieces = iter(first)
    next(pieces)
    engine._ops.passes.clear()
    long = scheduler.submit(writer(engine, list(range(300)) * 4, max_tokens=1))
    list(long)
    rows = engine._ops.passes
    mixed = [n for n in rows if n > 2]
    assert mixed.count(65) >= 1200 // 64 - 1 and max(rows) <= 65
    first.cancel()
    list(pieces)


# -- order -----------------------------------------------------------------------------------------------------------


def equal_sharing(jobs):
    """When each (arrival, work) ends on a machine of rate 1 that all share equally, step by step."""
    left, done, now = {}, {}, 0.0
    events = sorted(range(len(jobs)), key=lambda i: jobs[i][0])
    while events or left:
        nearest = jobs[events[0]][0] if events else np.inf
        if not left:
            now = max(now, nearest)
        else:
            step = min(min(left.values()) * len(left), nearest - now)
            now += step
            left = {i: w - step / len(left) for i, w in left.items()}
            for i in [i for i, w in left.items() if w < 1e-9]:
                done[i] = now
                del left[i]
        while events and jobs[events[0]][0] <= now:
            i = events.pop(0)
            left[i] = jobs[i][1]
    return [done[i] for i in range(len(jobs))]


def test_no_prompt_ends_later_than_under_equal_sharing():
    """The order of service, at the grain of a slice, over random arrivals."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        jobs = [(float(a), float(w)) for a, w in zip(rng.uniform(0, 3000, 40), rng.choice([20, 100, 400, 2000], 40),
                                                     strict=True)]
        fair, now, waiting, done = FairClock(), 0.0, [], {}
        arrivals = sorted(range(40), key=lambda i: jobs[i][0])
        while arrivals or waiting:
            if not waiting:
                now = max(now, jobs[arrivals[0]][0])
            while arrivals and jobs[arrivals[0]][0] <= now:
                i = arrivals.pop(0)
                waiting.append([fair.arrive(jobs[i][1]), i, jobs[i][1]])
            entry = min(waiting)
            step = min(entry[2], 64.0)
            now += step
            fair.advance(step)
            entry[2] -= step
            if not entry[2]:
                waiting.remove(entry)
                done[entry[1]] = now
        ideal = equal_sharing(jobs)
        assert all(done[i] <= ideal[i] + 3 * 64 for i in range(40))
        assert np.mean([done[i] - jobs[i][0] for i in range(40)]) < np.mean(
            [ideal[i] - jobs[i][0] for i in range(40)])


def test_a_clock_forgets_who_leaves():
    fair = FairClock()
    a, b = fair.arrive(100), fair.arrive(10)
    fair.advance(10)
    assert fair.now == 5
    fair.leave(b)
    fair.leave(b)
    fair.advance(50)
    assert fair.now == 55
    fair.advance(1000)
    assert fair.now == a == 100


def test_work_that_the_cache_spares_keeps_the_simulated_clock_going():
    """A long prompt's turn comes although short ones keep arriving, of which most turns out to be cached."""
    for credited, turns in ((190, 1000), (0, 3000)):
        fair, served = FairClock(), 0
        long = fair.arrive(1500)
        while served < turns and fair.arrive(200) <= long:  # comes, begins at once, is read
            fair.advance(credited)
            fair.advance(10)
            served += 1
        assert (served < turns) == bool(credited)


def test_what_the_cache_spared_is_credited(scheduled):
    engine = text_engine(checkpoint_every=32)
    scheduler = scheduled(engine, running=1)
    shared = list(range(200))
    streams = [scheduler.submit(writer(engine, [*shared, i], max_tokens=1)) for i in range(5)]
    advanced, advance = [], scheduler._clock.advance
    scheduler._clock.advance = lambda work: (advanced.append(work), advance(work))
    for stream in streams:
        list(stream)
    assert sum(advanced) >= sum(s._work for s in streams) - streams[0]._work  # the first may have begun before


def test_short_prompts_overtake_a_long_one(scheduled):
    engine = text_engine(cache_bytes=0)
    scheduler = scheduled(engine)
    long = scheduler.submit(writer(engine, list(range(250)) * 12, max_tokens=1))
    while not long.begun:
        time.sleep(0.001)
    short = [scheduler.submit(writer(engine, list(range(20)), max_tokens=1)) for _ in range(3)]
    for stream in (*short, long):
        list(stream)
    assert max(s.ended for s in short) < long.ended


# -- ends ------------------------------------------------------------------------------------------------------------


def test_cancelled_outputs_end_and_leave_what_they_read(scheduled):
    engine = text_engine()
    scheduler = scheduled(engine)
    stream = scheduler.submit(writer(engine, list(range(60)), max_tokens=4000))
    pieces = iter(stream)
    for _ in range(30):
        next(pieces)
    stream.cancel()
    last = list(pieces)[-1]
    assert last.finish == stream.writer.finish_reason == "cancelled" and scheduler.counters.cancelled == 1
    assert engine.cache.covered(list(range(60)) + stream.writer.tokens) >= 60 + 28

    waits = [scheduler.submit(writer(engine, list(range(200)) * 9, max_tokens=4)) for _ in range(6)]
    for stream in waits:
        stream.cancel()
    assert {list(stream)[-1].finish for stream in waits} == {"cancelled"}
    assert scheduler.active == scheduler.queued == scheduler._held_bytes == 0 and not scheduler._clock._tags


def test_time_limits(scheduled):
    engine = text_engine(cache_bytes=0)
    scheduler = scheduled(engine, running=1)
    stream = scheduler.submit(writer(engine, [1, 2], max_tokens=4000), seconds=0.15)
    late = scheduler.submit(writer(engine, [1, 2], max_tokens=4000), seconds=0.05)
    assert list(stream)[-1].finish == "time" and 0 < len(stream.writer.tokens) < 3000
    with pytest.raises(TimedOut, match="first token"):
        list(late)
    assert scheduler.counters.timed_out == 2


def test_the_queue_is_bounded(scheduled):
    engine = text_engine(cache_bytes=0)
    scheduler = scheduled(engine, running=1, waiting=3)
    first = scheduler.submit(writer(engine, [1, 2], max_tokens=4000))
    next(iter(first))
    queued = [scheduler.submit(writer(engine, [1, 2], max_tokens=1)) for _ in range(3)]
    with pytest.raises(QueueFull, match="3 requests are waiting") as error:
        scheduler.submit(writer(engine, [1, 2]))
    assert 1 <= error.value.retry_after <= 60 and scheduler.counters.refused == 1
    first.cancel()
    for stream in queued:
        list(stream)
    list(scheduler.submit(writer(engine, [1, 2])))


def test_closing_finishes_or_fails_what_is_there():
    engine = text_engine(cache_bytes=0)
    scheduler = Scheduler(engine)
    quick = scheduler.submit(writer(engine, [1, 2], max_tokens=3))
    endless = scheduler.submit(writer(engine, [1, 2], max_tokens=4000))
    closing = threading.Thread(target=scheduler.close, args=(0.3,))
    closing.start()
    assert list(quick)[-1].finish == "length"
    with pytest.raises(Closed):
        list(endless)
    closing.join()
    with pytest.raises(Closed):
        scheduler.submit(writer(engine, [1]))
    assert not scheduler._thread.is_alive()


def test_a_failed_pass_fails_its_requests_and_no_later_ones(scheduled):
    engine = text_engine()
    scheduler = scheduled(engine)
    stream = scheduler.submit(writer(engine, list(range(40)), max_tokens=4000))
    pieces = iter(stream)
    next(pieces)

    def broken(parts):
        raise MemoryError("no more")

    step, engine.step = engine.step, broken
    with pytest.raises(MemoryError):
        list(pieces)
    engine.step = step
    assert scheduler.counters.failed == 1
    again = scheduler.submit(writer(engine, list(range(40)), max_tokens=5))
    list(again)
    assert again.writer.tokens == alone(text_engine(cache_bytes=0), list(range(40)), max_tokens=5)[0]


def test_what_one_request_does_wrong_the_others_do_not_feel(scheduled):
    class Impossible:
        def allowed(self):
            return np.zeros(engine.config.vocab_size, bool)

        def push(self, token):
            return False

    class Broken(Impossible):
        def allowed(self):
            raise ValueError("a bug")

    engine = text_engine()
    scheduler = scheduled(engine)
    good = scheduler.submit(writer(engine, [1, 2], max_tokens=50))
    bad = [scheduler.submit(writer(engine, [1, 2], constraint=c)) for c in (Impossible(), Broken())]
    with pytest.raises(HybridLMError, match="allows no token"):
        list(bad[0])
    with pytest.raises(ValueError, match="a bug"):
        list(bad[1])
    assert list(good)[-1].finish == "length"


def test_constraints_and_logprobs():
    class Twice:
        """Token 7, then token 9, then the end."""

        def __init__(self):
            self.pushed = []

        def allowed(self):
            mask = np.zeros(engine.config.vocab_size, bool)
            mask[[7, 9][len(self.pushed)]] = True
            return mask

        def push(self, token):
            self.pushed.append(token)
            return len(self.pushed) == 2

    engine = reference_engine(small_config())
    scheduler = Scheduler(engine)
    stream = scheduler.submit(writer(engine, [1, 2, 3], constraint=Twice(), logprobs=3, temperature=1.0))
    a, b = list(stream)
    scheduler.close()
    assert (a.token, b.token, b.finish) == (7, 9, "eos")
    from hybridlm.engine.sampler import log_softmax

    for piece, text in ((a, [1, 2, 3]), (b, [1, 2, 3, 7])):
        x = log_softmax(engine.logits(text)[-1])
        assert piece.logprob == pytest.approx(x[piece.token], abs=1e-6)
        assert [t for t, _ in piece.top] == np.argsort(-x)[:3].tolist()
        assert [p for _, p in piece.top] == pytest.approx(np.sort(x)[::-1][:3], abs=1e-6)


def test_reading_from_an_event_loop(scheduled):
    engine = text_engine(cache_bytes=0)
    scheduler = scheduled(engine)

    async def read(i):
        stream = scheduler.submit(writer(engine, [i, 2], max_tokens=20))
        return [piece.token async for piece in stream]

    async def main():
        results = await asyncio.gather(*(read(i) for i in range(20)))
        stream = scheduler.submit(writer(engine, [1, 2], max_tokens=4000))
        async for _ in stream:
            stream.cancel()
        assert stream.writer.finish_reason == "cancelled"
        return results

    results = asyncio.run(main())
    for i, tokens in enumerate(results):
        assert tokens == alone(engine, [i, 2], max_tokens=20)[0]


def test_an_output_of_nothing(scheduled):
    engine = text_engine()
    scheduler = scheduled(engine)
    (piece,) = list(scheduler.submit(writer(engine, list(range(50)), max_tokens=0)))
    assert (piece.token, piece.finish) == (None, "length") and engine.cache.covered(list(range(50))) == 50
