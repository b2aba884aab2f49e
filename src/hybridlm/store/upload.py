"""Publishing: GGUF files and a model card to a repository on the hub, in one commit.

The card states what can be read off the files: shape, types, sizes, hashes, how to run them. What only the author knows
(licence, training, limits) is asked for or left to be written; a card that is there already is kept.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hybridlm.errors import FormatError, HybridLMError
from hybridlm.store import hub
from hybridlm.store.cache import Report

__all__ = ["ModelFile", "card", "publish", "read"]

_LICENSE = re.compile(r"[a-z0-9.+-]{1,40}")


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A file to publish, and what its card says of it."""

    path: Path
    nbytes: int
    sha256: str
    types: str
    parameters: int
    layers: str
    context: int
    chats: bool

    @property
    def bits(self) -> float:
        """A weight, all tensors counted."""
        return 8 * self.nbytes / self.parameters


def read(path: Path, report: Report) -> ModelFile:
    """Open and hash a file. Raises `FormatError` for what is no model of ours."""
    from hybridlm.config import LINEAR
    from hybridlm.formats.gguf_reader import GGUFFile

    if path.suffix.lower() != ".gguf":
        raise FormatError(f"{path}: not a .gguf file; make one with hybridlm convert or hybridlm quantize")
    with GGUFFile.open(path) as file:
        config = file.config
        by_type: dict[str, int] = {}
        for tensor in file.tensors.values():
            name = tensor.type.name.lower()
            by_type[name] = by_type.get(name, 0) + tensor.nbytes
        chats = file.chat_template is not None
    linear = config.layer_types.count(LINEAR)
    digest, done, total = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
            done += len(block)
            report(f"hashing {path.name}", done, total)
    types = ", ".join(sorted(by_type, key=lambda k: -by_type[k])[:3])
    return ModelFile(path, total, digest.hexdigest(), types, config.num_parameters(),
                     f"{linear} Gated DeltaNet + {config.num_hidden_layers - linear} attention",
                     config.max_position_embeddings, chats)


def card(repo_id: str, files: Sequence[ModelFile], license: str | None = None, base_model: str | None = None) -> str:
    """The model card, Markdown with the hub's YAML head."""
    _check_name(repo_id)
    if license and not _LICENSE.fullmatch(license):
        raise HybridLMError(f"license: {license!r} is no identifier; use one as the hub lists them, such as apache-2.0")
    first = files[0]
    head = ["---", *([f"license: {license}"] if license else []),
            *([f"base_model: {base_model}"] if base_model else []),
            "pipeline_tag: text-generation", "library_name: hybridlm",
            "tags: [gguf, hybridlm, hybrid, gated-deltanet]", "---"]
    rows = [f"| `{f.path.name}` | {f.types} | {f.nbytes / 1e9:.2f} GB | {f.bits:.2f} | `{f.sha256}` |" for f in files]
    verb = "chat" if first.chats else "generate"
    prompt = "" if first.chats else ' "Once upon a time"'
    return "\n".join([
        *head, "", f"# {repo_id.split('/')[1]}", "",
        f"A hybrid language model of {first.parameters / 1e9:.2f}B parameters as GGUF: {first.layers} layers, context "
        f"{first.context:,} tokens." + (f" Made from [{base_model}](https://huggingface.co/{base_model})." if base_model
                                        else ""), "",
        "| file | types | size | bits a weight | sha256 |", "|---|---|--:|--:|---|", *rows, "",
        "Run it with [hybridlm](https://pypi.org/project/hybridlm/), on a laptop's CPU or a GPU:", "",
        "    pip install hybridlm", f"    hybridlm {verb} {repo_id}{prompt}", f"    hybridlm serve {repo_id}", "",
        *([] if first.chats else ["It has no chat template: it continues text and was not tuned to answer.", ""])])


def publish(files: Sequence[ModelFile], repo_id: str, *, text: str | None, private: bool, report: Report) -> str:
    """Make the repository if need be and put files and card there, in one commit; returns its address.

    `text`: the card; None keeps one that is there. Raises `HybridLMError` for what the hub refuses. A transfer that
    breaks can be repeated: files that have arrived are not sent again.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    _check_name(repo_id)
    api = HfApi(endpoint=hub.endpoint())
    with hub.plain_errors(repo_id, None):
        report(f"publishing to {repo_id}: {sum(f.nbytes for f in files) / 1e9:.2f} GB", 0, 0)
        api.create_repo(repo_id, private=private, exist_ok=True)
        has_card = api.file_exists(repo_id, "README.md")
        additions = [CommitOperationAdd(f.path.name, str(f.path)) for f in files]
        if text is not None or not has_card:
            additions.append(CommitOperationAdd("README.md", (text or card(repo_id, files)).encode()))
        api.create_commit(repo_id, additions, commit_message="Add " + ", ".join(f.path.name for f in files))
    return f"{hub.endpoint()}/{repo_id}"


def _check_name(repo_id: str) -> None:
    if not re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", repo_id, re.ASCII):
        raise HybridLMError(f"{repo_id}: not a repository's name; it is OWNER/NAME")
