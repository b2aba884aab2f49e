"""Text from a data set on the Hugging Face hub, streamed: `data=hub:OWNER/NAME` or `hub:OWNER/NAME@CONFIG`.

The `datasets` library reads whatever form the set has, row by row, so nothing but the token shards is stored. Rows keep
their order, which makes a resumed tokenisation skip to where it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hybridlm.data.sources import Document, Source
from hybridlm.errors import DataError

__all__ = ["PREFIX", "HubSource"]

PREFIX = "hub:"
_UNKNOWN = 1 << 50  # bytes of a set that does not tell its size: not one to be read twice


@dataclass(frozen=True, slots=True)
class HubSource(Source):
    """The training split of a data set, behind the same face as files."""

    @property
    def nbytes(self) -> int:
        """Bytes that the set says it has."""
        return int(self._builder().info.dataset_size or _UNKNOWN)

    @property
    def fingerprint(self) -> str:
        """sha256 over the name, what of it is read, and the library's own hash of the files behind it."""
        builder = self._builder()
        told = f"{self.path} {self.text_field} {self.label_field} {builder.hash} {builder.config.name}"
        return hashlib.sha256(told.encode()).hexdigest()

    def documents(self, file: int = 0, skip: int = 0) -> Iterator[tuple[int, int, Document]]:
        """(0, row, document) from row `skip` on; none is empty."""
        builder = self._builder()
        split = "train" if "train" in (builder.info.splits or {"train": None}) else next(iter(builder.info.splits))
        rows = builder.as_streaming_dataset(split=split)
        for number, row in enumerate(rows.skip(skip) if skip else rows, skip):
            if self.text_field not in row:
                raise DataError(f"{self.path}: no column {self.text_field!r}; it has {', '.join(row)} "
                                "(choose with text=NAME)")
            text = row[self.text_field]
            if text is not None and not isinstance(text, str):
                raise DataError(f"{self.path}: {self.text_field!r} holds {type(text).__name__}, not text "
                                "(choose another with text=NAME)")
            if text:
                yield 0, number, Document(text, str(row.get(self.label_field) or ""))

    def _builder(self) -> Any:
        import datasets

        name, _, config = self.path.removeprefix(PREFIX).partition("@")
        try:
            return datasets.load_dataset_builder(name, config or None)
        except Exception as error:  # the library has dozens
            raise DataError(f"{self.path}: cannot be opened ({str(error).splitlines()[0][:200]})") from None
