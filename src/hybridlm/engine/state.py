"""`State`: everything a model remembers of the tokens it has read, in main memory.

It has two parts. Gated DeltaNet layers keep a matrix per head and the last few convolution inputs: of fixed size, and
rewritten by every token. Attention layers keep the keys and values of every token, in pages of 128 tokens that are
written once and from then on only read.

So growing adds a page and moves nothing. A clone copies the fixed part and the last, unfinished page; full pages are
shared, and Python's reference counts free them with their last owner. And a state can be continued but not
shortened: the matrices have forgotten how they were. Going back means continuing from a clone made earlier; or, right
after a pass that kept a `Trial`, going over its first tokens again.

As bytes a state describes itself: magic, version, a JSON header (layout, tokens), the part it owns, its full pages,
and a sha256 over all that precedes it. Reading checks sizes before it allocates, and the sum before it believes
anything.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain
from typing import Any, BinaryIO

import numpy as np

from hybridlm.engine.layout import PAGE, Layout, product
from hybridlm.errors import FormatError

__all__ = ["Pages", "State", "Trial"]

_MAGIC, _VERSION = b"hlmstate", 2
_PREFIX = struct.Struct("<8sII")  # magic, version, header bytes
_MAX_HEADER = 1 << 28


class Pages:
    """Keys and values of one group of attention layers."""

    __slots__ = ("addresses", "group", "layout", "pages")

    def __init__(self, layout: Layout, group: int) -> None:
        self.layout, self.group = layout, group
        self.pages: list[np.ndarray | None] = []  # uint8, flat `page_shape`; None before the window's first page
        # [layers, pages or more, K or V], what kernels read. Of dropped pages it holds the first kept one's, so that
        # no address in it is ever invalid.
        self.addresses = np.zeros((layout.layers.count(group), 0, 2), np.uint64)

    def table(self, slot: int) -> np.ndarray:
        """Addresses of the pages of one layer, uint64 [pages or more, 2]."""
        return self.addresses[slot]

    def reserve(self, position: int, tokens: int) -> None:
        """Pages for `tokens` in all; lets go of those that no token from `position` on can see."""
        while len(self.pages) * PAGE < tokens:
            self._append(_bytes(self.layout.page_bytes(self.group)))
        first = self.layout.first_page(self.group, position)
        if first and self.pages[first - 1] is not None:
            self.pages[:first] = [None] * first
            self.addresses[:, :first] = self.addresses[:, first:first + 1]

    def clone(self, position: int) -> Pages:
        """The same up to `position`: full pages shared, the used part of the last one copied."""
        copy = Pages(self.layout, self.group)
        first = self.layout.first_page(self.group, position)
        copy.adopt([None] * first + self.pages[first:position // PAGE])
        if used := position % PAGE:
            copy._append(_bytes(self.layout.page_bytes(self.group)))
            copy.last()[..., :used, :] = self.last(position // PAGE)[..., :used, :]
        return copy

    def adopt(self, pages: Sequence[np.ndarray | None]) -> None:
        """Become the owner, with others, of these pages, from the first on."""
        for page in pages:
            self._append(page)

    def last(self, index: int = -1) -> np.ndarray:
        """A page, the last one unless told, as bytes of `page_shape`."""
        page = self.pages[index]
        assert page is not None
        return page.reshape(self.layout.page_shape(self.group))

    def _append(self, page: np.ndarray | None) -> None:
        count = len(self.pages)
        self.pages.append(page)
        layers, _, heads, tokens, row = self.layout.page_shape(self.group)
        if count == self.addresses.shape[1]:
            old, self.addresses = self.addresses, np.zeros((layers, max(8, 2 * count), 2), np.uint64)
            self.addresses[:, :count] = old
        if page is not None:
            base = page.__array_interface__["data"][0]
            offsets = np.arange(2 * layers, dtype=np.uint64) * np.uint64(heads * tokens * row)
            self.addresses[:, count] = (np.uint64(base) + offsets).reshape(layers, 2)
            if count and self.pages[count - 1] is None:
                self.addresses[:, :count] = self.addresses[:, count:count + 1]


class State:
    """Memory of one sequence. `tokens` lists what has been read; an engine makes it and moves it on."""

    __slots__ = ("conv", "groups", "hidden", "layout", "recurrent", "tokens", "trial", "valid")

    def __init__(self, layout: Layout) -> None:
        """The state before the first token."""
        layers = layout.layers.count(-1)
        self.layout = layout
        self.tokens: list[int] = []
        self.valid = True  # False after a pass that did not finish: layers then disagree about the past
        self.conv = _floats((layers, *layout.conv))  # oldest column first
        self.recurrent = _floats((layers, *layout.recurrent))
        self.hidden = _floats((layout.hidden,))  # the last token's, after the final norm: what the head needs
        self.groups = tuple(Pages(layout, g) for g in range(len(layout.windows)))
        self.trial: Any = None

    @property
    def position(self) -> int:
        """Tokens read."""
        return len(self.tokens)

    @property
    def own_nbytes(self) -> int:
        """Bytes that only this state holds: all but its full pages."""
        full = self.position // PAGE
        unfinished = sum(p.nbytes for group in self.groups for p in group.pages[full:] if p is not None)
        return self.conv.nbytes + self.recurrent.nbytes + self.hidden.nbytes + unfinished

    @property
    def nbytes(self) -> int:
        """Bytes held in all, pages that others hold too included."""
        return self.own_nbytes + sum(page.nbytes for page in self.blocks())

    def blocks(self) -> list[np.ndarray]:
        """The full pages. They never change again; the same object in two states is the same memory."""
        full = self.position // PAGE
        return [page for g, group in enumerate(self.groups)
                for page in group.pages[self.layout.first_page(g, self.position):full] if page is not None]

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` more."""
        for group in self.groups:
            group.reserve(self.position, self.position + tokens)

    def clone(self) -> State:
        """An independent copy, sharing the full pages. So what this state has read cannot be taken back any more."""
        copy = State.__new__(State)
        copy.layout, copy.tokens, copy.valid = self.layout, self.tokens.copy(), self.valid
        copy.conv, copy.recurrent, copy.hidden = (_copy(a) for a in (self.conv, self.recurrent, self.hidden))
        copy.groups = tuple(group.clone(self.position) for group in self.groups)
        copy.trial = None
        if self.trial is not None:
            self.trial.position = -1
        return copy

    def reset(self) -> None:
        """Back to before the first token, keeping the memory of the fixed part."""
        self.tokens, self.valid = [], True
        for array in (self.conv, self.recurrent, self.hidden):
            array[...] = 0
        self.groups = tuple(Pages(self.layout, g) for g in range(len(self.layout.windows)))

    def new_trial(self) -> Any:
        """What the next pass shall keep, should it be taken back."""
        return Trial(self)

    # -- bytes ---------------------------------------------------------------------------------------------------

    def block_bytes(self, block: Any) -> Any:
        """A full page as a buffer."""
        return block

    def block_of(self, data: Any) -> Any:
        """A page from its bytes, where this state's pages are."""
        return self.block(data)

    def rebuilt(self, tokens: list[int], own: Any, blocks: Sequence[Any]) -> State:
        """Another state of this layout, where this one is; see `rebuild`."""
        return State.rebuild(self.layout, tokens, own, blocks)

    def loaded(self, data: bytes | bytearray | memoryview) -> State:
        """Another state of this layout, where this one is, from bytes; see `from_bytes`."""
        view = memoryview(data)
        return self.read(io.BytesIO(view), len(view), "state", self.layout, like=self)

    @staticmethod
    def block(data: Any) -> np.ndarray:
        """A page from its bytes."""
        page = _bytes(len(data))
        page[:] = np.frombuffer(data, np.uint8)
        return page

    def own_parts(self) -> list[Any]:
        """Contiguous buffers of all but the full pages, `Layout.own_bytes` together."""
        used = self.position % PAGE
        last = [np.ascontiguousarray(group.last(self.position // PAGE)[..., :used, :]) for group in self.groups
                if used]
        return [_flat(a) for a in (self.conv, self.recurrent, self.hidden, *last)]

    @classmethod
    def rebuild(cls, layout: Layout, tokens: list[int], own: Any, blocks: Sequence[np.ndarray]) -> State:
        """The inverse of `own_parts` (joined) and `blocks`; the blocks are shared, not copied. ValueError where sizes
        do not fit."""
        data, offset = np.frombuffer(own, np.uint8), 0
        if (data.nbytes != layout.own_bytes(len(tokens))
                or [b.nbytes for b in blocks] != [layout.page_bytes(g) for g in layout.full_pages(len(tokens))]):
            raise ValueError("state: parts of the wrong size")
        state = cls(layout)
        state.tokens = list(tokens)
        for array in (state.conv, state.recurrent, state.hidden):
            _flat(array)[:] = data[offset:offset + array.nbytes]
            offset += array.nbytes
        full, used, taken = len(tokens) // PAGE, len(tokens) % PAGE, 0
        for g, group in enumerate(state.groups):
            first = layout.first_page(g, len(tokens))
            group.adopt([None] * first + list(blocks[taken:taken + full - first]))
            taken += full - first
        for g, group in enumerate(state.groups):
            if used:
                group.reserve(len(tokens), len(tokens))
                part = group.last()[..., :used, :]
                size = layout.page_bytes(g) // PAGE * used
                part[...] = data[offset:offset + size].reshape(part.shape)
                offset += size
        return state

    def to_bytes(self) -> bytes:
        """Self-describing and checksummed; the inverse of `from_bytes`."""
        stream = io.BytesIO()
        self.write(stream)
        return stream.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview, layout: Layout | None = None) -> State:
        """Rebuild a state. Raises `FormatError` when the bytes are damaged, or of another layout than the one given."""
        view = memoryview(data)
        return cls.read(io.BytesIO(view), len(view), "state", layout)

    def write(self, stream: BinaryIO) -> None:
        """`to_bytes` into a stream, without a second copy in memory."""
        header = json.dumps({"layout": asdict(self.layout), "tokens": self.tokens}, separators=(",", ":")).encode()
        header += b" " * (-(len(header) + _PREFIX.size) % 64)
        digest = hashlib.sha256()
        pages = (self.block_bytes(block) for block in self.blocks())
        for part in chain([_PREFIX.pack(_MAGIC, _VERSION, len(header)), header], self.own_parts(), pages):
            digest.update(part)
            stream.write(part)
        stream.write(digest.digest())

    @classmethod
    def read(cls, stream: BinaryIO, size: int, name: str, layout: Layout | None = None,
             like: State | None = None) -> State:
        """`from_bytes` from a stream of `size` bytes; `name` is what errors call it. The state comes to where `like`
        is, on a device perhaps."""

        def refuse(reason: str) -> FormatError:
            return FormatError(f"{name}: {reason}; read the text again to make a new one")

        prefix = stream.read(_PREFIX.size)
        if len(prefix) < _PREFIX.size or prefix[:8] != _MAGIC:
            raise refuse("not a saved hybridlm state")
        _, version, header_size = _PREFIX.unpack(prefix)
        if version != _VERSION:
            raise refuse(f"saved in version {version} of the format, this program reads version {_VERSION}")
        payload = size - _PREFIX.size - header_size - 32
        if header_size > _MAX_HEADER or payload < 0:
            raise refuse("truncated or damaged")
        header = stream.read(header_size)
        try:
            described = json.loads(header)
            found = Layout.from_dict(described["layout"])
            tokens = described["tokens"]
            if not all(type(t) is int and 0 <= t < 1 << 31 for t in tokens):
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise refuse("damaged header") from None
        if layout is not None and found != layout:
            raise refuse("saved by another model or with another kv_type")
        own, pages = found.own_bytes(len(tokens)), [found.page_bytes(g) for g in found.full_pages(len(tokens))]
        if own + sum(pages) != payload:
            raise refuse("truncated or damaged")
        digest = hashlib.sha256(prefix)
        digest.update(header)
        parts = []
        for length in [own, *pages]:
            part = _bytes(length)
            if stream.readinto(part.data) != length:  # type: ignore[attr-defined]
                raise refuse("truncated")
            digest.update(part.data)
            parts.append(part)
        if stream.read(32) != digest.digest():
            raise refuse("damaged, its checksum does not match")
        return like.rebuilt(tokens, parts[0], parts[1:]) if like else cls.rebuild(found, tokens, parts[0], parts[1:])

    def __repr__(self) -> str:
        return f"State(position={self.position}, nbytes={self.nbytes})"


class Trial:
    """What a pass leaves behind so that its last tokens can be taken back: the matrices as they were before, and the
    rows that went into them. Cheaper than the matrices after each token: at 7B 53 MB and 1.7 MB a token."""

    __slots__ = ("conv", "hidden", "position", "recurrent", "rows")

    def __init__(self, state: State) -> None:
        self.conv, self.recurrent = np.empty_like(state.conv), _floats(state.recurrent.shape)
        self.position = -1  # before the pass; -1: none to take back
        self.hidden = np.empty((0, state.layout.hidden), np.float32)  # the pass's final rows
        self.rows: dict[int, tuple[np.ndarray, ...]] = {}  # per Gated DeltaNet layer: q, k, v, a, b

    def keep(self, slot: int, state: State, *rows: np.ndarray) -> None:
        """Before a layer's matrices move on: remember them, and the rows that will move them."""
        self.conv[slot], self.recurrent[slot] = state.conv[slot], state.recurrent[slot]
        self.rows[slot] = tuple(row.copy() for row in rows)

    def go_back(self, state: State) -> None:
        """Give the state its matrices from before the pass (and take the others, as memory for the next trial)."""
        state.conv, self.conv = self.conv, state.conv
        state.recurrent, self.recurrent = self.recurrent, state.recurrent
        del state.tokens[self.position:]
        self.position = -1


def _bytes(count: int) -> np.ndarray:
    """Zeroed bytes from a multiple of 64 on. Zeroed, so that no kernel meets a NaN in a page's unused rows."""
    raw = np.zeros(count + 64, np.uint8)
    start = -int(raw.__array_interface__["data"][0]) % 64
    return raw[start:start + count]


def _floats(shape: tuple[int, ...]) -> np.ndarray:
    return _bytes(4 * product(shape)).view(np.float32).reshape(shape)


def _copy(array: np.ndarray) -> np.ndarray:
    copy = _floats(array.shape)
    copy[...] = array
    return copy


def _flat(array: np.ndarray) -> np.ndarray:
    """The memory of a contiguous array as bytes, also of an empty one."""
    return array.reshape(-1).view(np.uint8)
