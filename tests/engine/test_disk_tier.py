"""The prefix cache's checkpoints on a disk: nothing lost that is paid for, nothing wrong after damage or `kill -9`."""

import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from tests.engine.test_prefix_cache import Fake

from hybridlm.engine import disk_tier
from hybridlm.engine.disk_tier import DiskTier
from hybridlm.engine.prefix_cache import PrefixCache
from hybridlm.errors import HybridLMError

BIG = 10**9


def rebuild(tokens, own, blocks):
    if len(own) != size_of(tokens):
        raise ValueError
    made = Fake(tuple(tokens), len(own), blocks)
    assert b"".join(made.own_parts()) == own  # a checksum let something wrong through
    return made


def size_of(tokens):
    return 100 + len(tokens) % 7


def opened(folder, budget=BIG, disk=BIG, fingerprint="m"):
    cache = PrefixCache(budget)
    cache.keep_on_disk(DiskTier(folder, fingerprint, disk, lambda data: np.frombuffer(data, np.uint8), rebuild))
    return cache


def entry(tokens, blocks=()):
    return Fake(tuple(tokens), size_of(tokens), list(blocks))


def pages(count, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, 4000).astype(np.uint8) for _ in range(count)]


def texts(count):
    """A tree of texts with common beginnings."""
    rng, made = random.Random(0), {(1,) * 50: None}
    while len(made) < count:
        made[(*rng.choice(list(made)[-30:]), *[rng.randrange(5)] * rng.randrange(40, 60))] = None
    return list(made)


def on_disk(folder):
    return sum(p.stat().st_size for p in folder.glob("*/*"))


def test_it_outlives_the_process_and_shares_blocks(tmp_path):
    cache, pool = opened(tmp_path), pages(5)
    for i in range(1, 6):
        cache.put(entry(range(40 * i), pool[:i]))
    assert cache.flush() == 5 and cache.flush() == 0
    assert len(list(tmp_path.glob("*/*.page"))) == 5 and cache.disk.nbytes == on_disk(tmp_path)
    if os.name == "posix":  # what was said is nobody else's
        assert all(p.stat().st_mode & 0o077 == 0 for p in tmp_path.glob("*/*.*"))
    cache.close()
    again = opened(tmp_path)
    assert len(again.disk) == 5 and again.nbytes == len(again) == 0 and again.disk.nbytes == on_disk(tmp_path)
    assert again.covered(range(170)) == 160
    for i in (3, 5, 1):
        found = again.find(range(40 * i))
        assert found.tokens == tuple(range(40 * i))
        assert [b.tobytes() for b in found.blocks()] == [b.tobytes() for b in pool[:i]]
    assert len({id(b) for e in again for b in e.blocks()}) == 5 and again.stats.reloaded == 3
    assert again.flush() == 0, "what came from the disk is there already"


def test_evicted_ones_come_back(tmp_path):
    made = texts(120)
    cache = opened(tmp_path, budget=1000)
    for tokens in made:
        cache.put(entry(tokens))
        cache._spilling.join()
    assert cache.stats.evicted > 100 and len(cache) < 12
    for tokens in random.Random(1).sample(made, 120):
        found = cache.find(tokens)
        assert len(found.tokens) > len(tokens) - 32, "all of it is on the disk or in memory, or nearly all in memory"
        cache._spilling.join()
        walk(cache)
    assert cache.nbytes <= 1000 and cache.disk.nbytes == on_disk(tmp_path)


def walk(cache):
    """The tree has a place for each checkpoint on the disk and no place without a use."""
    stack, stored = [cache._root], set()
    while stack:
        node = stack.pop()
        if node.parent is not None:
            assert node.entry is not None or node.stored is not None or len(node.children) > 1
        if node.stored is not None:
            assert len(node.stored.tokens) == node.depth
            stored.add(node.stored.path)
        stack += node.children.values()
    assert stored == set(cache.disk._entries)


def test_its_budget_holds_and_the_longest_unused_goes(tmp_path):
    cache = opened(tmp_path, budget=10**6, disk=60_000)
    pool = pages(40)
    for i in range(40):
        cache.put(entry((i,) * 100, [pool[i]]))
        cache.flush()
        if i == 10:
            cache.clear()  # so that it must come from the disk, which counts as a use
            assert cache.find((3,) * 100) is not None
        if i > 10:
            assert cache.find((3,) * 100) is not None  # in memory: a use all the same
            assert cache.flush() == 0, "what had to leave the disk is not written again and again"
        assert cache.disk.nbytes == on_disk(tmp_path) <= 60_000
    assert {3, 39} <= {int(s.tokens[0]) for s in cache.disk._entries.values()} and len(cache.disk) < 15
    walk(cache)
    kept = [tuple(s.tokens.tolist()) for s in cache.disk._entries.values()]
    cache.close()
    less = opened(tmp_path, disk=30_000)  # a smaller budget: those used last stay
    assert 0 < len(less.disk) < len(kept) and less.disk.nbytes == on_disk(tmp_path) <= 30_000
    assert [tuple(s.tokens.tolist()) for s in less.disk._entries.values()] == kept[-len(less.disk):]
    walk(less)


def test_what_memory_nearly_has_is_not_read(tmp_path):
    cache = opened(tmp_path)
    cache.put(entry(range(100)))
    cache.put(entry(range(110)))
    cache.flush()
    cache.clear()
    cache.find(range(100))
    assert cache.find(range(110)).tokens == tuple(range(100)) and cache.stats.reloaded == 1
    assert cache.covered(range(110)) == 100


def test_a_disk_that_is_full_costs_nothing_but_the_reuse(tmp_path, monkeypatch):
    cache, files = opened(tmp_path), 0

    def full(path):
        nonlocal files
        files += 1
        if files > 2:  # two pages find room
            raise OSError(28, "No space left on device")
        return private(path)

    private = disk_tier._private
    cache.put(entry(range(50), pages(4)))
    monkeypatch.setattr(disk_tier, "_private", full)
    assert cache.flush() == 0 and cache.find(range(50)) is not None
    assert not list(tmp_path.glob("*/*.*")) and cache.disk.nbytes == 0
    monkeypatch.undo()
    assert cache.flush() == 1 and cache.disk.nbytes == on_disk(tmp_path)


def test_one_process_and_one_model_a_folder(tmp_path):
    cache = opened(tmp_path)
    with pytest.raises(HybridLMError, match="another process"):
        opened(tmp_path)
    cache.close()
    with pytest.raises(HybridLMError, match="another model"):
        opened(tmp_path, fingerprint="other")
    (tmp_path / "file").write_text("")
    with pytest.raises(HybridLMError, match="cannot be used"):
        opened(tmp_path / "file")
    opened(tmp_path).close()


@pytest.mark.parametrize("seed", range(4))
def test_damage_is_found_and_forgotten(tmp_path, seed):
    rng, pool, total = random.Random(seed), pages(6), 0
    made = texts(30)
    for _ in range(12):
        cache = opened(tmp_path)
        for i, tokens in enumerate(made):
            cache.put(entry(tokens, pool[:i % 6]))
        cache.close()
        for path in rng.sample(sorted(tmp_path.glob("*/*.*")), 4):
            data = bytearray(path.read_bytes())
            kind = rng.randrange(3)
            if kind == 0:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            elif kind == 1:
                del data[rng.randrange(len(data)):]
            if kind == 2:
                path.unlink()
            else:
                path.write_bytes(data)
        (tmp_path / "ab").mkdir(exist_ok=True)
        (tmp_path / "ab" / ".abc.page.12345678.tmp").write_bytes(b"left behind")
        again = opened(tmp_path)
        assert not list(tmp_path.glob("*/.*"))
        hits = 0
        for i, tokens in enumerate(made):
            found = again.find(tokens)
            if found is not None and found.tokens == tokens:
                hits += 1
                assert [b.tobytes() for b in found.blocks()] == [b.tobytes() for b in pool[:i % 6]]
        assert hits >= 1
        total += hits
        walk(again)
        again.close()
    assert 12 * 5 < total < 12 * 28, "neither all lost nor all unharmed"


WRITER = """
import sys, itertools
from tests.engine.test_disk_tier import entry, opened, pages, texts
cache, pool, made = opened(sys.argv[1], budget=3000, disk=200_000), pages(6), texts(200)
print("ready", flush=True)
for n in itertools.count():
    i = n % 200
    cache.put(entry(made[i], pool[:i % 6]))
    if n % 20 == 0:
        cache.flush()
"""


def test_killed_at_any_moment_it_is_valid_or_not_there(tmp_path):
    rng, made, pool, seen = random.Random(0), texts(200), pages(6), 0
    for _ in range(6):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"ready\n"
        time.sleep(rng.uniform(0.05, 0.6))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        cache = opened(tmp_path, disk=200_000)
        for i, tokens in enumerate(made):
            found = cache.find(tokens)
            if found is not None and found.tokens == tokens:
                seen += 1
                assert [b.tobytes() for b in found.blocks()] == [b.tobytes() for b in pool[:i % 6]]
        assert cache.stats.lost == 0, "a file was there under its name but not whole"
        cache.close()
    assert seen > 50
