"""A model folder's tokenizer as GGUF metadata: the whole `tokenizer.json`, and llama.cpp's arrays made from it.

Read back is the former; the arrays are there for others. They exist for byte-pair encodings only, the kind that every
Olmo has.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hybridlm.config import HybridConfig
from hybridlm.errors import FormatError
from hybridlm.formats.gguf_writer import Entry, boolean, i32_list, strings, text, u32
from hybridlm.text.chat import ChatTemplate
from hybridlm.text.tokenizer import Tokenizer

__all__ = ["tokenizer_entries"]

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.cpp's token types

# Pre-tokenizers by their split pattern -> llama.cpp's name for it.
_CL100K = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
           r"\s+(?!\S)|\s+")


def tokenizer_entries(folder: str | Path, config: HybridConfig) -> dict[str, Entry]:
    """All entries about text; {} for a folder without tokenizer, whose model takes token ids."""
    folder = Path(folder)
    file = folder / "tokenizer.json"
    if not file.is_file():
        return {}
    tokenizer = Tokenizer.from_file(folder)  # says what is wrong with a damaged file
    if tokenizer.vocab_size > config.vocab_size:
        raise FormatError(f"{file}: has {tokenizer.vocab_size} tokens, more than the model's vocab_size of "
                          f"{config.vocab_size}; it belongs to another model")
    entries = {"tokenizer.huggingface.json": text(tokenizer.to_json())}
    entries |= _arrays(json.loads(tokenizer.to_json()), config.vocab_size)
    ids = {"bos": config.bos_token_id, "padding": config.pad_token_id if config.pad_token_id is not None
           else tokenizer.pad, "eos": config.eos_token_ids[0] if config.eos_token_ids else tokenizer.eos}
    for key, token in ids.items():
        if token is not None and 0 <= token < config.vocab_size:
            entries[f"tokenizer.ggml.{key}_token_id"] = u32(token)
    template = ChatTemplate.from_folder(folder)
    if template is not None:
        entries["tokenizer.chat_template"] = text(template.source)
    return entries


def _arrays(data: dict[str, Any], size: int) -> dict[str, Entry]:
    model = data.get("model") or {}
    if model.get("type") != "BPE":
        return {}
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [UNUSED] * size
    for token, i in model["vocab"].items():
        tokens[i], types[i] = token, NORMAL
    for added in data.get("added_tokens") or []:
        i = added["id"]
        tokens[i], types[i] = added["content"], CONTROL if added.get("special") else USER_DEFINED
    merges = [m if isinstance(m, str) else " ".join(m) for m in model.get("merges") or []]
    return {"tokenizer.ggml.model": text("gpt2"), "tokenizer.ggml.pre": text(_pre(data)),
            "tokenizer.ggml.tokens": strings(tokens), "tokenizer.ggml.token_type": i32_list(types),
            "tokenizer.ggml.merges": strings(merges), "tokenizer.ggml.add_bos_token": boolean(False),
            "tokenizer.ggml.add_eos_token": boolean(False)}


def _pre(data: dict[str, Any]) -> str:
    """llama.cpp's name of the pre-tokenizer: "dbrx" splits like dolma2 (cl100k), "gpt-2" is plain byte-level."""
    pre = data.get("pre_tokenizer") or {}
    parts = pre.get("pretokenizers") or [pre]
    patterns = [(p.get("pattern") or {}).get("Regex") for p in parts if p.get("type") == "Split"]
    if patterns == [_CL100K]:
        return "dbrx"
    if not patterns and any(p.get("type") == "ByteLevel" and p.get("use_regex", True) for p in parts):
        return "gpt-2"
    return "default"
