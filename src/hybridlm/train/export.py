"""A checkpoint of any run, however many processes wrote it -> a Hugging Face folder or one GGUF file."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from hybridlm.atomic import atomic_folder
from hybridlm.errors import ConfigError, HybridLMError
from hybridlm.formats.convert import convert
from hybridlm.formats.gguf_writer import Progress
from hybridlm.text import Tokenizer
from hybridlm.train.start import config_of, is_run, run_of, tokenizer_of, weights_of, whole_model

__all__ = ["export"]


def export(source: str | Path, out: str | Path, *, type: str = "q8_0", dtype: torch.dtype = torch.bfloat16,
           progress: Progress | None = None) -> Path:
    """Write a model from a run (its newest good checkpoint), one of its checkpoints, or a model folder.

    Args:
        out: NAME.gguf for a GGUF file, anything else for a folder that is not there yet.
        type: of a GGUF file's matrices, which are made from the checkpoint's float32.
        dtype: of a folder's weights.

    Raises `ConfigError` where `out` is in the way, `DataError` where no checkpoint is good.
    """
    source, out = Path(source), Path(out)
    if not source.exists():
        raise ConfigError(f"{source}: no such run, checkpoint or model folder")
    single = out.suffix.lower() == ".gguf"
    if not single and out.exists():
        raise ConfigError(f"{out}: exists already; give another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        if not single:
            with atomic_folder(out) as aside:
                _folder(source, aside, dtype)
        elif not is_run(source):
            convert(source, out, type.lower(), progress, name=source.resolve().name)
        else:
            aside = out.with_name(f".{out.name}.tmp")
            shutil.rmtree(aside, ignore_errors=True)
            try:
                _folder(source, aside, torch.float32)
                convert(aside, out, type.lower(), progress, name=run_of(source).resolve().name)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise HybridLMError(f"{out}: cannot be written ({error.strerror}); make room, or give another place") from None
    return out


def _folder(source: Path, out: Path, dtype: torch.dtype) -> None:
    """A model folder with its tokenizer."""
    whole_model(config_of(source)[0], weights_of(source)).save_pretrained(out, dtype=dtype)
    found = tokenizer_of(source)
    if found:
        Tokenizer.from_file(found).save(out)
