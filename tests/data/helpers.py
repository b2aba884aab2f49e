"""Text and tokenizers that the tests make themselves."""

from __future__ import annotations

import random
from functools import cache

from hybridlm.text import Tokenizer, train_bpe

SENTENCE = "the hybrid model reads a stream of words and keeps one matrix per head while ünïcode 字 stays whole"
WORDS = SENTENCE.split()


def text(seed: int, words: int = 60) -> str:
    """Reproducible prose with paragraphs."""
    rng = random.Random(seed)
    return "".join(rng.choice(WORDS) + rng.choice([" ", " ", " ", ", ", ".\n", ".\n\n"]) for _ in range(words))


@cache
def tokenizer(vocab: int = 300) -> Tokenizer:
    return train_bpe([text(i) for i in range(50)], vocab)
