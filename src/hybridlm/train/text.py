"""From the text that a recipe names to what a run trains on: tokenizer, token shards, both splits.

    OUT/tokenizer/            trained on the data, or copied in
    OUT/tokens/               token shards; of a mixture a folder for each source
    OUT/tokens-val/           where validation text is given

Everything is made once and found by the same command run again.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from hybridlm.atomic import atomic_folder
from hybridlm.data import Mixture, Source, TokenFolder, TokenStream, join, parse_mixture, tokenize
from hybridlm.data.shards import held_out
from hybridlm.data.tokens import MANIFEST
from hybridlm.errors import ConfigError
from hybridlm.text import Tokenizer, train_bpe
from hybridlm.train.recipe import Recipe

__all__ = ["Text", "prepare"]

_BPE_CHARACTERS = 1 << 28  # a tokenizer is trained on at most so much of the text


@dataclass(frozen=True)
class Text:
    """What a run reads. `content` identifies the tokens and their mixture; `unique` counts each token once."""

    tokenizer: Tokenizer
    train: TokenStream
    val: TokenStream
    content: str
    unique: int


def prepare(recipe: Recipe, out: Path) -> Text:
    """Make it, or find it from an earlier start. Raises a `HybridLMError` when there is no text or it has changed."""
    if (Path(recipe.data) / MANIFEST).is_file() and (Path(recipe.data) / "train-00000.bin").is_file():
        raise ConfigError("data: a folder of token shards; give the text they were made from")
    held = Source.open(recipe.val, text_field=recipe.text, label_field=recipe.label) if recipe.val else None
    parts = parse_mixture(recipe.data)
    sources = [Source.open(path, text_field=recipe.text, label_field=recipe.label, without=held.files if held else ())
               for path, _ in parts]
    fraction = 0.0 if held else recipe.val_fraction
    for source in sources:
        for why, number in sorted(source.skipped.items()):
            if number:
                _say(f"data: {number} {why} left out")
    tokenizer = _tokenizer(recipe, sources, fraction, out / "tokenizer")
    if len(sources) == 1:
        folder = _tokenize(sources[0], tokenizer, out / "tokens", fraction)
        train, val = folder.train, folder.val
        content, unique = folder.manifest["content"], len(folder.train)
    else:
        names = _names([path for path, _ in parts])
        folders = [_tokenize(source, tokenizer, out / "tokens" / name, fraction)
                   for source, name in zip(sources, names, strict=True)]
        weights = tuple(weight for _, weight in parts)
        train = Mixture(tuple(f.train for f in folders), weights, recipe.seed)
        val = join([(name, f.val) for name, f in zip(names, folders, strict=True)])
        content = " ".join(f"{f.manifest['content']}:{w!r}" for f, w in zip(folders, weights, strict=True))
        unique = sum(len(f.train) for f in folders)
    if held:
        val = _tokenize(held, tokenizer, out / "tokens-val", 0.0).train
    return Text(tokenizer, train, val, content + tokenizer.fingerprint, unique)


def _names(paths: list[str]) -> list[str]:
    """A short name for each source, no two alike."""
    names: list[str] = []
    for path in paths:
        stem = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(path.rstrip("/")).name.split(".")[0]).strip("-") or "source"
        same = sum(name == stem or name.startswith(f"{stem}-") for name in names)
        names.append(f"{stem}-{same + 1}" if same else stem)
    return names


def _tokenize(source: Source, tokenizer: Tokenizer, out: Path, fraction: float) -> TokenFolder:
    last, began = time.monotonic(), time.monotonic()

    def show(documents: int, tokens: int) -> None:
        nonlocal last
        if time.monotonic() - last > 5:
            last = time.monotonic()
            _say(f"tokenising: {documents:,} documents, {tokens:,} tokens, {tokens / (last - began):,.0f} tok/s")

    return tokenize(source, tokenizer, out, val_fraction=fraction, progress=show)


def _tokenizer(recipe: Recipe, sources: list[Source], fraction: float, folder: Path) -> Tokenizer:
    """The run's own copy of its tokenizer."""
    given = Tokenizer.from_file(recipe.tokenizer) if recipe.tokenizer else None
    if (folder / "tokenizer.json").exists():
        own = Tokenizer.from_file(folder)
        if given and given.fingerprint != own.fingerprint:
            raise ConfigError(f"tokenizer: differs from that of the run, {folder}; give another out=")
        return own
    if given is None:
        _say(f"training a tokenizer of {recipe.vocab} entries")
        limit = _BPE_CHARACTERS // len(sources)
        given = train_bpe(chain.from_iterable(_sample(s, fraction, limit) for s in sources), recipe.vocab)
    with atomic_folder(folder) as aside:
        given.save(aside)
    return given


def _sample(source: Source, fraction: float, limit: int) -> Iterator[str]:
    """About `limit` characters to train a tokenizer on, none held out: of a large source every n-th document."""
    every = max(1, source.nbytes // limit) if source.files else 1  # a stream is not read to its end for this
    is_held_out = held_out(source, fraction)
    held = 0
    for _, _, document in islice(source.documents(), 0, None, every):
        if held > 2 * limit:
            return
        if not is_held_out(document.text):
            held += len(document.text)
            yield document.text


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
