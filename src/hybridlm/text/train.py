"""Train a byte-level BPE tokenizer on one's own text.

Any text can be spelled, since the 256 bytes are in the vocabulary. Pieces are cut as GPT-4's cl100k does: words with
their leading space, at most three digits together, punctuation runs, line ends apart. The result depends on the text
and the options alone, not on the number of cores.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from hybridlm.errors import ConfigError, DataError
from hybridlm.text.tokenizer import Tokenizer

__all__ = ["SPECIAL_TOKENS", "train_bpe"]

SPECIAL_TOKENS = ("<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>")

# The published pattern of cl100k_base (OpenAI tiktoken), in the regular expressions of the `tokenizers` library.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_bpe(
    texts: Iterable[str] | Sequence[Path],
    vocab_size: int,
    out: str | Path | None = None,
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
    *,
    progress: bool = False,
) -> Tokenizer:
    """Train a byte-level BPE and return it.

    Args:
        texts: documents as strings, or `Path`s of UTF-8 files (each one document).
        vocab_size: entries in all: special tokens, 256 bytes, merges. Little text may give fewer.
        out: a folder (gets `tokenizer.json` and `tokenizer_config.json`) or a `.json` file; None writes nothing.
        special_tokens: take the first ids, in order; the first one is eos.

    Raises `ConfigError` for an impossible size, `DataError` for unreadable or no text.
    """
    least = 256 + len(special_tokens)
    if vocab_size < least:
        raise ConfigError(f"vocab_size: {vocab_size} is too small; {least} hold the bytes and the special tokens")
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=progress,
    )
    seen = _Count()
    backend.train_from_iterator(seen.over(_documents(texts)), trainer)
    if not seen.characters:
        raise DataError("no text to train a tokenizer on; give files that are not empty")
    tokenizer = Tokenizer(backend.to_str(), eos=special_tokens[0] if special_tokens else None)
    if out is not None:
        out = Path(out)
        if out.suffix == ".json":
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(tokenizer.to_json(), encoding="utf-8")
        else:
            tokenizer.save(out)
    return tokenizer


class _Count:
    """Characters that went by."""

    def __init__(self) -> None:
        self.characters = 0

    def over(self, texts: Iterable[str]) -> Iterator[str]:
        for text in texts:
            self.characters += len(text)
            yield text


def _documents(texts: Iterable[str] | Sequence[Path]) -> Iterator[str]:
    for item in texts:
        if isinstance(item, Path):
            try:
                yield item.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"{item}: cannot be read as UTF-8 text ({error})") from None
        else:
            yield item
