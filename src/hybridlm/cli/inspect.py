"""`hybridlm inspect MODEL`: what a model file holds."""

from __future__ import annotations

from collections import defaultdict
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybridlm.cli._common import JsonOption, ModelArgument, print_json, printable, resolved, size

if TYPE_CHECKING:
    from hybridlm.config import HybridConfig
    from hybridlm.formats.gguf_reader import GGUFFile

SHORT = {"linear_attention": "Gated DeltaNet", "full_attention": "attention", "sliding_attention": "sliding attention"}


def command(
    model: ModelArgument,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    metadata: Annotated[bool, typer.Option("--metadata", help="List every metadata entry.")] = False,
    json: JsonOption = False,
) -> None:
    """Show what a model file holds: shape, tensors, types, sizes."""
    from hybridlm.formats.gguf_reader import GGUFFile

    with GGUFFile.open(resolved(model)) as file:
        facts = describe(file)
        if tensors or json:
            facts["tensors"] = [{"name": t.name, "shape": list(t.shape), "type": t.type.name.lower(), "bytes": t.nbytes}
                                for t in file.tensors.values()]
        if json:
            print_json(facts)
            return
        show(facts, file.config)
        if tensors:
            for t in facts["tensors"]:
                print(f"{t['name']:<40} {'x'.join(map(str, t['shape'])):>16} {t['type']:>6} {size(t['bytes']):>10}")
        if metadata:
            for key in file.metadata:
                print(f"{key} = {_short(file.metadata[key])}")


def describe(file: GGUFFile) -> dict[str, Any]:
    """Facts about a file, as plain data."""
    c = file.config
    types: dict[str, dict[str, int]] = defaultdict(lambda: {"tensors": 0, "bytes": 0})
    for t in file.tensors.values():
        types[t.type.name.lower()]["tensors"] += 1
        types[t.type.name.lower()]["bytes"] += t.nbytes
    return {
        "path": file.path, "bytes": file.nbytes, "name": file.metadata.get("general.name"),
        "architecture": file.metadata.get("general.architecture"), "fingerprint": file.fingerprint,
        "parameters": c.num_parameters(), "parameters_without_tables": c.num_parameters(embedding=False),
        "bits_per_weight": 8 * file.nbytes / c.num_parameters(), "types": dict(types), "config": c.to_dict(),
        "has_tokenizer": file.tokenizer_json is not None, "has_chat_template": file.chat_template is not None,
    }


def show(facts: dict[str, Any], c: HybridConfig) -> None:
    """The same for people."""
    rows = [
        ("file", f"{facts['path']}, {size(facts['bytes'])}, {facts['bits_per_weight']:.2f} bits a weight"),
        ("parameters", f"{facts['parameters']:,} ({facts['parameters_without_tables']:,} outside the tables)"),
        ("layers", f"{c.num_hidden_layers}: {_layers(c)}"),
        ("widths", f"hidden {c.hidden_size}, MLP {c.intermediate_size}, vocabulary {c.vocab_size:,}"
                   f"{', head tied to the input table' if c.tie_word_embeddings else ''}"),
    ]
    if "linear_attention" in c.layer_types:
        rows.append(("Gated DeltaNet", f"{c.key_heads} key heads of {c.key_dim}, {c.value_heads} value heads of "
                                       f"{c.value_dim}, convolution over {c.linear_conv_kernel_dim}"))
    if c.has_attention:
        rows.append(("attention", f"{c.num_attention_heads} heads of {c.head_dim}, {c.kv_heads} of keys and values, "
                                  f"{_position(c)}{f', window {c.sliding_window}' if c.sliding_window else ''}"))
    rows += [
        ("context", f"{c.max_position_embeddings:,} tokens"),
        ("tensors", ", ".join(f"{v['tensors']} {k} ({size(v['bytes'])})" for k, v in facts["types"].items())),
        ("text", f"{'tokenizer' if facts['has_tokenizer'] else 'no tokenizer'}, "
                 f"{'chat template' if facts['has_chat_template'] else 'no chat template: continues text'}"),
        ("fingerprint", str(facts["fingerprint"])),
    ]
    for name, value in rows:
        print(f"{name:<16}{printable(value)}")


def _layers(c: HybridConfig) -> str:
    """Runs of equal layers: "3 Gated DeltaNet, 1 attention, 8 times"."""
    runs = [(kind, len(list(run))) for kind, run in groupby(c.layer_types)]
    for period in range(1, len(runs) + 1):
        if len(runs) % period == 0 and runs == runs[:period] * (len(runs) // period):
            told = ", ".join(f"{n} {SHORT[kind]}" for kind, n in runs[:period])
            return told + (f", {len(runs) // period} times" if len(runs) > period else "")
    raise AssertionError


def _position(c: HybridConfig) -> str:
    def of(rope: Any) -> str:
        if rope is None:
            return "no positions (NoPE)"
        return f"rope theta {rope.theta:,.0f}" + (f" with YaRN x{rope.yarn.factor:g}" if rope.yarn else "")

    kinds = dict.fromkeys(of(c.rope_of(i)) for i, kind in enumerate(c.layer_types) if kind != "linear_attention")
    return " / ".join(kinds)


def _short(value: Any) -> str:
    text = printable(repr(value) if not isinstance(value, str) else value).replace("\n", "\\n")
    return text if len(text) <= 120 else f"{text[:100]}... ({len(value) if hasattr(value, '__len__') else len(text):,})"
