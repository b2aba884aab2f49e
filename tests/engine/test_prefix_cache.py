"""The prefix cache against a dictionary, and its file against damage. Checkpoints here are plain stand-ins."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hybridlm.engine.prefix_cache import PrefixCache


@dataclass(eq=False)
class Fake:
    """A checkpoint of `size` own bytes."""

    tokens: tuple[int, ...]
    size: int = 10
    shared: list[np.ndarray] = field(default_factory=list)

    @property
    def own_nbytes(self):
        return self.size

    def blocks(self):
        return self.shared

    def own_parts(self):
        return [bytes([len(self.tokens) % 256]) * (self.size - self.size // 2), bytes(self.size // 2)]

    def block_bytes(self, block):
        return block


def walk_tree(cache):
    """Check the radix tree's shape; the depths of its entries."""
    stack, entries = [cache._root], []
    while stack:
        node = stack.pop()
        if node.parent is not None:
            assert len(node.edge) and node.depth == node.parent.depth + len(node.edge)
            assert node.entry is not None or len(node.children) > 1, "a node that serves nothing"
        if node.entry is not None:
            entries.append(node)
            path, above = [], node
            while above is not None:
                path = above.edge.tolist() + path
                above = above.parent
            assert path == list(node.entry.tokens)
        for first, child in node.children.items():
            assert child.parent is node and first == int(child.edge[0])
        stack += node.children.values()
    assert set(entries) == cache._nodes
    return entries


class Model(RuleBasedStateMachine):
    """Random use; a dictionary says what must be found."""

    @initialize(budget=st.sampled_from([0, 25, 60, 200, 10**6]))
    def begin(self, budget):
        self.cache = PrefixCache(budget)
        self.given = {}
        self.pool = [np.zeros(7, np.uint8) for _ in range(6)]

    tokens = st.lists(st.integers(0, 2), max_size=8).map(tuple)

    @rule(tokens=tokens, size=st.integers(1, 30), shared=st.sets(st.integers(0, 5)))
    def put(self, tokens, size, shared):
        entry = Fake(tokens, size, [self.pool[i] for i in shared])
        present = {e.tokens for e in self.cache}
        fits = bool(tokens) and self.cache.budget > 0
        assert self.cache.put(entry) == (fits and tokens not in present)
        if fits and tokens not in present:
            self.given[tokens] = entry
            assert entry in list(self.cache), "the newest must not be evicted for itself"

    @rule(tokens=tokens)
    def find(self, tokens):
        present = {e.tokens: e for e in self.cache}
        prefixes = [tokens[:n] for n in range(len(tokens), 0, -1) if tokens[:n] in present]
        covered = self.cache.covered(tokens)
        hits = self.cache.stats.hits
        found = self.cache.find(tokens)
        if prefixes:
            assert found is present[prefixes[0]] is self.given[prefixes[0]] and covered == len(prefixes[0])
            assert self.cache.stats.hits == hits + 1 and list(self.cache)[-1] is found
        else:
            assert found is None and covered == 0

    @rule()
    def clear(self):
        self.cache.clear()
        assert self.cache.nbytes == 0 and len(self.cache) == 0

    @invariant()
    def counts(self):
        entries = list(self.cache)
        blocks = {id(b): b.nbytes for e in entries for b in e.shared}
        assert self.cache.nbytes == sum(e.size for e in entries) + sum(blocks.values())
        assert self.cache.nbytes <= self.cache.budget or len(entries) == 1
        assert len(entries) == len(self.cache) == len(walk_tree(self.cache))
        if self.cache.budget == 10**6:
            assert self.cache.stats.evicted == 0


Model.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None,
                                   suppress_health_check=list(HealthCheck))
TestModel = Model.TestCase


def test_a_long_prompt_thins_out_evenly():
    cache = PrefixCache(80)
    tokens = list(range(3200))
    for end in range(100, 3300, 100):
        cache.put(Fake(tuple(tokens[:end])))
    kept = sorted(len(e.tokens) for e in cache)
    assert len(kept) == 8 and kept[-1] == 3200
    assert max(np.diff([0, *kept])) <= 800, kept


def test_what_is_used_stays():
    cache = PrefixCache(100)
    system = Fake(tuple(range(50)))
    cache.put(system)
    for i in range(200):
        assert cache.find([*range(50), 100 + i]) is system
        cache.put(Fake((*range(50), 100 + i, *range(60))))
    assert len(cache) == 10 and cache.stats.evicted == 191
    for i in range(200):  # and what is not used goes, in time
        cache.put(Fake((1000 + i, *range(60))))
    assert cache.find(range(50)) is None


def test_the_cheapest_to_read_again_goes_first():
    cache = PrefixCache(30)
    for tokens in ((1,) * 100, (2,) * 20, (3,) * 500):
        cache.put(Fake(tokens))
    cache.put(Fake((4,) * 60))
    assert sorted(len(e.tokens) for e in cache) == [60, 100, 500]
    cache.put(Fake((5,) * 60, size=11))  # 10 bytes are not enough: two go
    assert sorted(len(e.tokens) for e in cache) == [60, 500]


def filled(budget=10**6):
    cache, rng = PrefixCache(budget), np.random.default_rng(0)
    pool = [rng.integers(0, 256, 40).astype(np.uint8) for _ in range(5)]
    for i in range(6):
        cache.put(Fake(tuple(range(10 * i + 5)), 10 + i, pool[:i]))
    return cache


def reload(path, fingerprint="m", budget=10**6):
    cache = PrefixCache(budget)

    def rebuild(tokens, own, blocks):
        if len(own) != 10 + len(tokens) // 10:
            raise ValueError
        return Fake(tuple(tokens), len(own), blocks)

    return cache, cache.load(path, fingerprint, lambda data: np.frombuffer(data, np.uint8), rebuild)


def test_disk_round_trip_shares_blocks_and_keeps_the_order(tmp_path):
    cache = filled()
    cache.find(range(15))
    cache.save(tmp_path / "c", "m")
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
    again, count = reload(tmp_path / "c")
    assert count == len(cache) == 6 and again.nbytes == cache.nbytes
    assert [e.tokens for e in again] == [e.tokens for e in cache]
    for a, b in zip(again, cache, strict=True):
        assert [x.tobytes() for x in a.shared] == [x.tobytes() for x in b.shared]
    assert len({id(b) for e in again for b in e.shared}) == 5
    assert reload(tmp_path / "c", "another")[1] == 0
    assert reload(tmp_path / "missing")[1] == 0


def test_a_smaller_budget_loads_the_most_recent(tmp_path):
    cache = filled()
    cache.find(range(5))
    cache.save(tmp_path / "c", "m")
    again, count = reload(tmp_path / "c", budget=30)
    assert 0 < count < 6 and again.nbytes <= 30 and again.find(range(9)) is not None


@pytest.mark.parametrize("seed", range(3))
def test_a_damaged_file_gives_what_is_sound(tmp_path, seed):
    cache = filled()
    cache.save(tmp_path / "c", "m")
    good = (tmp_path / "c").read_bytes()
    truth = {e.tokens: e for e in cache}
    rng, counts = np.random.default_rng(seed), []
    for _ in range(150):
        bad = bytearray(good)
        for _ in range(int(rng.integers(1, 3))):
            bad[int(rng.integers(len(bad)))] ^= 1 << int(rng.integers(8))
        if rng.integers(4) == 0:
            del bad[int(rng.integers(len(bad))):]
        (tmp_path / "c").write_bytes(bad)
        again, count = reload(tmp_path / "c")
        counts.append(count)
        assert count == len(again)
        for entry in again:
            assert [b.tobytes() for b in entry.shared] == [b.tobytes() for b in truth[entry.tokens].shared]
    assert 0 in counts and any(0 < c < 6 for c in counts)
