"""Small tokenizers of each kind, made once."""

from functools import cache

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from hybridlm.text import Tokenizer, train_bpe

TEXT = [
    "the cat sat on the mat, 12345 times; naïve façade — 日本語のテキスト 👩‍👩‍👧 \n\n"
    "\tdef f(x):\n    return x ** 2\n"
] * 3


@cache
def byte_level() -> Tokenizer:
    return train_bpe(TEXT, 400)


@cache
def metaspace() -> Tokenizer:
    """SentencePiece-like: metaspace words, unknown characters as byte tokens."""
    backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>", *[f"<0x{b:02X}>" for b in range(256)]]
    trainer = trainers.BpeTrainer(vocab_size=330, show_progress=False, special_tokens=special)
    backend.train_from_iterator(["the cat sat on the mat and that is that"], trainer)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer.from_json(backend.to_str())
