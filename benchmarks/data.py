"""Tokenisation beside the tokenizers library alone, and how many tokens a second one process feeds to training.

    python -m benchmarks.data --text FOLDER --tokenizer FOLDER [--megabytes 64] [--json FILE]

Tokenisation: text to shards on disk, hashes and all, against `encode_batch_fast` of the same documents in memory with
all cores; interleaved, medians. Loader: `at(step)` of ready token shards, one process, by order and length.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from hybridlm.data import Mixture, Source, TokenFolder, order_of, tokenize
from hybridlm.text import Tokenizer


def sample(text: str, megabytes: int, folder: Path) -> list[str]:
    """Documents of about so many megabytes, also written to `folder` as JSON lines."""
    documents, size = [], 0
    for _, _, document in Source.open(text).documents():
        documents.append(document.text)
        size += len(document.text)
        if size > megabytes << 20:
            break
    folder.mkdir()
    with (folder / "text.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": d}) + "\n" for d in documents)
    return documents


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def tokenisation(documents: list[str], tokenizer: Tokenizer, work: Path, repeat: int,
                 workers: int | None) -> tuple[dict, TokenFolder]:
    source, out = Source.open(work / "text"), work / "tokens"
    alone, whole = [], []
    batches = [documents[i:i + 256] for i in range(0, len(documents), 256)]
    backend = tokenizer._plain
    for _ in range(repeat):
        alone.append(seconds(lambda: [len(backend.encode_batch_fast(b, add_special_tokens=False)) for b in batches]))
        shutil.rmtree(out, ignore_errors=True)
        whole.append(seconds(lambda: tokenize(source, tokenizer, out, workers=workers)))
    folder = TokenFolder.open(out)
    tokens = len(folder.train)
    return {"what": "tokenise", "cores": os.cpu_count(), "tokens": tokens, "library": round(tokens / median(alone)),
            "whole": round(tokens / median(whole)), "share": round(median(alone) / median(whole), 3)}, folder


def loading(folder: TokenFolder, repeat: int) -> list[dict]:
    lines = []
    mixture = Mixture((folder.train, folder.train), (0.7, 0.3), 0)
    for name, stream, packing, repetition in (
            ("stream", folder.train, "stream", 0), ("repetition", folder.train, "stream", 32),
            ("mixture", mixture, "stream", 32), ("whole", folder.train, "whole", 32)):
        for sequence in (512, 2048, 8192):
            order = order_of(stream, packing, sequence, max(1, (1 << 18) // sequence), 0, repetition)
            _ = order.at(0).documents
            times = []
            for step in range(1, repeat + 1):
                began = time.perf_counter()
                _ = order.at(step).documents
                times.append(time.perf_counter() - began)
            lines.append({"what": "load", "order": name, "sequence": sequence,
                          "tokens_per_second": round(order.batch * sequence / median(times))})
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--workers", type=int, help="processes that tokenise; 1: this one, with the library's threads")
    parser.add_argument("--json")
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(args.tokenizer)
    with tempfile.TemporaryDirectory() as work:
        documents = sample(args.text, args.megabytes, Path(work) / "text")
        line, folder = tokenisation(documents, tokenizer, Path(work), args.repeat, args.workers)
        print(f"tokenise {line['tokens']:,} tokens on {line['cores']} cores: library {line['library']:,} tok/s, "
              f"whole {line['whole']:,} tok/s, {line['share']:.1%}", flush=True)
        lines = [line]
        for line in loading(folder, 5 * args.repeat):
            print(f"load {line['order']:10s} x {line['sequence']:5d}: {line['tokens_per_second']:,} tok/s", flush=True)
            lines.append(line)
    if args.json:
        Path(args.json).write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
