"""`StreamDecoder`: token ids to text one at a time, never showing half a character, never decoding the past again.

Two ways, both constant work per token. Byte-level tokenizers: each token stands for fixed bytes, which go through an
incremental UTF-8 decoder; the concatenation equals `Tokenizer.decode` of all ids for every id sequence, valid or not.
Others (metaspace, byte fallback): the difference between decoding a few tokens of context with and without the new
ones, held back while it ends inside a character; equal to the full decode wherever that is valid UTF-8.
"""

from __future__ import annotations

import codecs

from hybridlm.text.tokenizer import Tokenizer

__all__ = ["StreamDecoder"]

_CONTEXT = 4  # tokens kept as context; decoders look at no more than the one before
_HELD = 4  # a character is at most four byte tokens: more pending ones can never complete it


class StreamDecoder:
    """`push` each id as it is generated and print what it returns; `finish` gives what is left.

    >>> decoder = StreamDecoder(tokenizer)
    >>> text = "".join(decoder.push(i) for i in ids) + decoder.finish()   # == tokenizer.decode(ids)
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = False) -> None:
        self.tokenizer = tokenizer
        self.skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace") if tokenizer.is_byte_level else None
        self._context: list[int] = []
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that this token completes; "" while a character is unfinished."""
        token_id = int(token_id)
        if self.skip_special and token_id in self.tokenizer.special_ids:
            return ""
        if self._utf8 is not None:
            return self._utf8.decode(self.tokenizer.token_bytes(token_id))
        self._pending.append(token_id)
        before, after = self._texts()
        if after.endswith("\ufffd") and len(self._pending) < _HELD:
            return ""
        return self._emit(before, after)

    def finish(self) -> str:
        """The rest, an unfinished character as U+FFFD; the decoder is then as new."""
        if self._utf8 is not None:
            text = self._utf8.decode(b"", final=True)
            self._utf8.reset()
            return text
        text = self._emit(*self._texts()) if self._pending else ""
        self._context, self._pending = [], []
        return text

    def _texts(self) -> tuple[str, str]:
        decode = self.tokenizer.decode
        return decode(self._context), decode(self._context + self._pending)

    def _emit(self, before: str, after: str) -> str:
        self._context = (self._context + self._pending)[-_CONTEXT:]
        self._pending = []
        return after[len(before):] if after.startswith(before) else after[-1:]
