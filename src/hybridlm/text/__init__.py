"""Text in, tokens out, and back: tokenizers, chat templates, the streaming detokeniser. Never imports torch."""

from hybridlm.text.chat import CHATML, ChatTemplate
from hybridlm.text.stream import StreamDecoder
from hybridlm.text.tokenizer import Tokenizer
from hybridlm.text.train import SPECIAL_TOKENS, train_bpe

__all__ = ["CHATML", "SPECIAL_TOKENS", "ChatTemplate", "StreamDecoder", "Tokenizer", "train_bpe"]
