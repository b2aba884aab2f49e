"""`hybridlm tokenizer train` and `hybridlm tokenizer inspect`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hybridlm.cli._common import JsonOption, print_json

if TYPE_CHECKING:
    from hybridlm.text import Tokenizer

app = typer.Typer(no_args_is_help=True)


@app.command()
def train(
    data: Annotated[list[Path], typer.Argument(metavar="DATA...", help="Text, .jsonl(.gz, .zst) or .parquet files, or "
                                                                       "folders of them.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A folder, or a file named .json.")],
    vocab: Annotated[int, typer.Option("--vocab", help="Entries in all: special tokens, 256 bytes, merges.")] = 4096,
    text: Annotated[str, typer.Option("--text", help="The field of JSON lines and Parquet that holds text.")] = "text",
) -> None:
    """Train a byte-level BPE on your own text."""
    from hybridlm.data import Source
    from hybridlm.text import train_bpe

    sources = [Source.open(path, text_field=text) for path in data]

    def texts() -> Iterator[str]:
        for source in sources:
            for _, _, document in source.documents():
                yield document.text

    tokenizer = train_bpe(texts(), vocab, out, progress=sys.stderr.isatty())
    print(f"{out}: {tokenizer.vocab_size:,} entries")


@app.command()
def inspect(
    tokenizer: Annotated[str, typer.Argument(metavar="TOKENIZER", help="A tokenizer.json, its folder, or a GGUF "
                                                                       "file.")],
    text: Annotated[str | None, typer.Option("--text", help="Show how this text is cut.")] = None,
    json: JsonOption = False,
) -> None:
    """Show what a tokenizer holds, and how it cuts a text."""
    t = _open(tokenizer)
    facts: dict[str, object] = {
        "vocab_size": t.vocab_size, "byte_level": t.is_byte_level, "eos": t.eos, "pad": t.pad,
        "special_tokens": {str(t.id_to_token(i)): i for i in sorted(t.special_ids)}, "fingerprint": t.fingerprint,
    }
    if text is not None:
        ids = t.encode(text)
        facts |= {"ids": ids, "pieces": [t.decode([i]) for i in ids], "bytes": len(text.encode())}
    if json:
        return print_json(facts)
    print(f"{t.vocab_size:,} entries, {'byte-level' if t.is_byte_level else 'not byte-level'}; eos {_token(t, t.eos)}, "
          f"pad {_token(t, t.pad)}")
    print("special tokens: " + (", ".join(f"{token} {i}" for token, i in _special(t)) or "none"))
    if text is not None:
        print("|".join(t.decode([i]) for i in ids))
        print(f"{len(ids)} tokens, {len(text.encode()) / max(1, len(ids)):.2f} bytes a token: {ids}")
    return None


def _open(name: str) -> Tokenizer:
    from hybridlm.text import Tokenizer

    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        from hybridlm.errors import FormatError
        from hybridlm.formats.gguf_reader import GGUFFile

        with GGUFFile.open(path) as file:
            if file.tokenizer_json is None:
                raise FormatError(f"{path}: holds no tokenizer.json; give the folder that it was converted from")
            eos = file.config.eos_token_ids
            return Tokenizer.from_json(file.tokenizer_json, eos=eos[0] if eos else None)
    return Tokenizer.from_file(path)


def _special(t: Tokenizer) -> list[tuple[str, int]]:
    return [(str(t.id_to_token(i)), i) for i in sorted(t.special_ids)]


def _token(t: Tokenizer, token_id: int | None) -> str:
    return "none" if token_id is None else f"{t.id_to_token(token_id)} ({token_id})"
