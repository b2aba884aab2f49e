"""What a page is made of, before it is HTML or Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hybridlm.scaling.style import Drawing

__all__ = ["Block", "Facts", "Folded", "Page", "Section", "Table", "Text"]


@dataclass(frozen=True)
class Text:
    """A paragraph; `aside` is one of the doubts and notes."""

    text: str
    aside: bool = False


@dataclass(frozen=True)
class Table:
    """`words`: how many columns at the front are names rather than figures; the first is each row's header.

    `last_words`: whether the last column is words too.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1
    last_words: bool = False

    def is_words(self, column: int) -> bool:
        return column < self.words or (self.last_words and column == len(self.head) - 1)


@dataclass(frozen=True)
class Facts:
    """A few figures that stand out: (value, what it is)."""

    items: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Folded:
    """Blocks that are there for whoever wants them."""

    title: str
    blocks: Sequence[Table | Text]


Block = Text | Table | Facts | Folded | Drawing


@dataclass
class Section:
    title: str
    blocks: list[Block] = field(default_factory=list)


@dataclass
class Page:
    title: str
    lead: str
    sections: list[Section]
    foot: str = ""
