"""`Tokenizer`: any Hugging Face `tokenizer.json` behind six plain methods.

The work is done by the `tokenizers` library. This wrapper settles what callers otherwise get wrong: whether text such
as "<|endoftext|>" inside a document may become the special token (only when asked), which token ends a sequence, and
what a damaged file is called.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
import tokenizers.decoders

from hybridlm.errors import FormatError, HybridLMError

__all__ = ["Tokenizer"]

MAX_FILE_BYTES = 256 << 20  # the largest published tokenizer.json is a tenth of this
_EOS_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|eot_id|>", "<|im_end|>", "[SEP]")
_PAD_NAMES = ("<|pad|>", "<pad>", "[PAD]")


def _byte_alphabet() -> dict[str, int]:
    """The byte-level alphabet: printable Latin-1 stands for itself, every other byte for a letter from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in visible}
    hidden = [byte for byte in range(256) if byte not in set(visible)]
    table.update({chr(0x100 + i): byte for i, byte in enumerate(hidden)})
    return table


_BYTE_OF = _byte_alphabet()


class Tokenizer:
    """Text to token ids and back. Immutable and safe to share between threads.

    Build one with `from_file` (a `tokenizer.json` or a folder that holds one) or `from_json` (its text).
    """

    def __init__(
        self, text: str, *, eos: int | str | None = None, pad: int | str | None = None, name: str = "tokenizer.json"
    ) -> None:
        self._json = text
        self._backend = _load(text, name)
        self.eos: int | None = self._special(eos, _EOS_NAMES)
        self.pad: int | None = self._special(pad, _PAD_NAMES)

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Open a `tokenizer.json`, or a folder with one; a `tokenizer_config.json` beside it names eos and pad.

        Raises `FormatError` when the file is missing, damaged or no tokenizer.
        """
        file = Path(path)
        if file.is_dir():
            file = file / "tokenizer.json"
        try:
            if file.stat().st_size > MAX_FILE_BYTES:
                raise FormatError(f"{file}: too large for a tokenizer.json ({file.stat().st_size} bytes)")
            text = file.read_text(encoding="utf-8")
        except OSError as error:
            reason = f"cannot be read ({error.strerror}); give a tokenizer.json or its folder"
            raise FormatError(f"{file}: {reason}") from None
        except UnicodeDecodeError:
            raise FormatError(f"{file}: not UTF-8 text, so not a tokenizer.json") from None
        config = _read_config(file.with_name("tokenizer_config.json"))
        return cls(text, eos=_content(config.get("eos_token")), pad=_content(config.get("pad_token")), name=str(file))

    @classmethod
    def from_json(cls, text: str, *, eos: int | None = None) -> Tokenizer:
        """Build from the text of a `tokenizer.json`. Raises `FormatError` when it is damaged."""
        return cls(text, eos=eos)

    def to_json(self) -> str:
        """The text this tokenizer was built from, unchanged."""
        return self._json

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json` and a `tokenizer_config.json` that names eos and pad into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self._json, encoding="utf-8")
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        for key, token in (("eos_token", self.eos), ("pad_token", self.pad)):
            if token is not None:
                config[key] = self.id_to_token(token) or ""
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    # -- text to ids and back ------------------------------------------------------------------------------------

    def encode(self, text: str, *, special: bool = True, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text.

        `special`: text that spells a special token ("<|im_start|>") becomes that token; pass False for text from
        outside, which must not. `add_special_tokens`: run the file's own post-processor (BOS and the like).
        """
        backend = self._backend if special else self._plain
        ids: list[int] = backend.encode(_encodable(text), add_special_tokens=add_special_tokens).ids
        return ids

    def encode_batch(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        """`encode` of many texts, on all cores unless TOKENIZERS_PARALLELISM=false. Documents: `special` is False."""
        backend = self._backend if special else self._plain
        encoded = backend.encode_batch_fast([_encodable(t) for t in texts], add_special_tokens=False)
        return [e.ids for e in encoded]

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Text of token ids; ids outside the vocabulary (rows that only pad a model's table) give nothing."""
        text: str = self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)
        return text

    def token_to_id(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        """The token as the file spells it (byte-level letters, not text)."""
        return self._backend.id_to_token(int(token_id)) if token_id >= 0 else None

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for, for byte-level tokenizers; else the UTF-8 of its text in mid-sentence."""
        token = self.id_to_token(token_id)
        if token is None:
            return b""
        if not self.is_byte_level:
            return token.replace("\u2581", " ").encode()
        try:
            return bytes(_BYTE_OF[c] for c in token)
        except KeyError:  # an added token outside the byte alphabet stands for its own text
            return token.encode()

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """The same, reading special tokens in text as ordinary text; a flag flipped per call would race in threads."""
        backend = _load(self._json, "tokenizer.json")
        backend.encode_special_tokens = True
        return backend

    # -- what it is ----------------------------------------------------------------------------------------------

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id: what a model's table must hold at least."""
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the special tokens."""
        return frozenset(i for i, t in self._backend.get_added_tokens_decoder().items() if t.special)

    @cached_property
    def is_byte_level(self) -> bool:
        """Whether tokens are spelled in the byte-level alphabet, so that each stands for fixed bytes."""
        return isinstance(self._backend.decoder, tokenizers.decoders.ByteLevel)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the file's content with its whitespace normalised, as 64 hex digits: equal means equal tokens."""
        return hashlib.sha256(json.dumps(json.loads(self._json), sort_keys=True).encode()).hexdigest()

    def __len__(self) -> int:
        return self.vocab_size

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, eos={self.eos})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self._json, self.eos, self.pad)

    def _special(self, wanted: int | str | None, names: tuple[str, ...]) -> int | None:
        if isinstance(wanted, int):
            return wanted
        for name in ([wanted] if wanted else []) + list(names):
            token = self._backend.token_to_id(name)
            if token is not None:
                return token
        return None


def _rebuild(text: str, eos: int | None, pad: int | None) -> Tokenizer:
    return Tokenizer(text, eos=eos, pad=pad)


def _load(text: str, name: str) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_str(text)
        backend.no_padding()
        backend.no_truncation()
        return backend
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # the library signals damage by bare Exception and, from Rust, by a panic
        reason = str(error).split("\n")[0][:200]
        raise FormatError(f"{name}: not a usable tokenizer.json ({reason}); download or train it again") from None


def _encodable(text: str) -> str:
    """Lone surrogates (from `errors="surrogateescape"` or JSON) have no UTF-8; they become U+FFFD."""
    if not isinstance(text, str):
        raise HybridLMError(f"encode: expected text, not {type(text).__name__}")
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _read_config(file: Path) -> dict[str, Any]:
    """`tokenizer_config.json` as a dict; {} when absent."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise FormatError(f"{file}: damaged ({error}); delete it or download it again") from None
    if not isinstance(data, dict):
        raise FormatError(f"{file}: expected a JSON object")
    return data


def _content(token: Any) -> str | None:
    """A token in tokenizer_config.json is its text, or an object with its text under "content"."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
