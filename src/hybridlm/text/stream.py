"""`StreamDecoder`: token ids to text one at a time, never showing half a character, never decoding the past again.

Two ways, both constant work per token. Byte-level tokenizers: each token stands for fixed bytes, which go through an
incremental UTF-8 decoder; the concatenation equals `Tokenizer.decode` of all ids for every id sequence, valid or not.
Others (metaspace, byte fallback): the difference between decoding a few tokens of context with and without the new
ones, held back while it ends inside a character; equal to the full decode wherever that is valid UTF-8. Context is cut
only between groups of tokens that were shown together: a run of byte tokens that starts inside a character is garbage.
"""

from __future__ import annotations

import codecs
import re

from hybridlm.text.tokenizer import Tokenizer

__all__ = ["StreamDecoder"]

_CONTEXT = 4  # tokens kept as context, one group at least; decoders look at no more than the one before
_HELD = 4  # a character is at most four byte tokens: more pending ones can never complete it
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class StreamDecoder:
    """`push` each id as it is generated and print what it returns; `finish` gives what is left.

    >>> decoder = StreamDecoder(tokenizer)
    >>> text = "".join(decoder.push(i) for i in ids) + decoder.finish()   # == tokenizer.decode(ids)
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = False) -> None:
        self.tokenizer = tokenizer
        self.skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace") if tokenizer.is_byte_level else None
        self._context: list[list[int]] = []
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that this token completes; "" while a character is unfinished."""
        token_id = int(token_id)
        if self.skip_special and token_id in self.tokenizer.special_ids:
            return ""
        if self._utf8 is not None:
            return self._utf8.decode(self.tokenizer.token_bytes(token_id))
        if self.tokenizer.id_to_token(token_id) is None:  # decoding ignores it, and it is no context
            return ""
        self._pending.append(token_id)
        before, after = self._texts()
        if after.endswith("\ufffd") and len(self._pending) < _HELD and not self._whole():
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
        decode, context = self.tokenizer.decode, [i for group in self._context for i in group]
        return decode(context), decode(context + self._pending)

    def _whole(self) -> bool:
        """Whether the pending tokens are bytes that spell whole characters: U+FFFD itself, written by a model."""
        tokens = [_BYTE.fullmatch(self.tokenizer.id_to_token(i) or "") for i in self._pending]
        try:
            return bool(bytes(int(t[1], 16) for t in tokens if t).decode()) and all(tokens)
        except UnicodeDecodeError:
            return False

    def _emit(self, before: str, after: str) -> str:
        self._context.append(self._pending)
        while len(self._context) > 1 and sum(map(len, self._context)) > _CONTEXT:
            del self._context[0]
        self._pending = []
        return after[len(before):] if after.startswith(before) else after[-1:]
