"""Text in, tokens out, and back: tokenizers, chat templates, the streaming detokeniser. Never imports torch.

Modules are loaded when a name of theirs is first used: a model that only continues text needs no template engine.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hybridlm.text.chat import CHATML, ChatTemplate
    from hybridlm.text.stream import StreamDecoder
    from hybridlm.text.tokenizer import Tokenizer
    from hybridlm.text.train import SPECIAL_TOKENS, train_bpe

__all__ = ["CHATML", "SPECIAL_TOKENS", "ChatTemplate", "StreamDecoder", "Tokenizer", "train_bpe"]

_HOME = {"CHATML": "chat", "ChatTemplate": "chat", "StreamDecoder": "stream", "Tokenizer": "tokenizer",
         "SPECIAL_TOKENS": "train", "train_bpe": "train"}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"hybridlm.text.{_HOME[name]}"), name)
    raise AttributeError(f"module 'hybridlm.text' has no attribute {name!r}")
