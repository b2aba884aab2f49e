"""What quantisation does to a trained model: mean KL divergence from its float32 logits on held-out text.

Each experiment replaces matrices by what they decode to after encoding, and runs the model in float32, so that the
figure is of the weights alone. Rows of a small model that are not whole blocks of 256 are encoded several together, so
that K-quants can be measured on it. Experiments:

    types   all matrices in one type (the head too), with and without importance
    roles   the matrices of one role, or of one layer, in 4 bits (q4_k), the others in float32
    mixes   the mixes of `formats/policy.py`, with the types that the 7B's tensors would get
    plain   the same for types that are asked for by name, whose head is q8_0

Bits a weight are those that the 7B would have, all of its tensors counted. Input table and head are measured as two
tensors, as they are there, though a small model ties them. Prints a table and one line of JSON.

    python benchmarks/quantisation.py MODEL.gguf HELD_OUT_TEXT --calibrate TEXT [--tokens 8192]
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hybridlm import native
from hybridlm.config import PRESETS
from hybridlm.engine import Engine
from hybridlm.engine.cpu import CPU, file_loader
from hybridlm.engine.layout import Layout
from hybridlm.engine.weights import bind
from hybridlm.evals.bits_per_byte import documents_of
from hybridlm.formats.blocks import GGMLType, block_size, dequantize, nbytes
from hybridlm.formats.encode import encode
from hybridlm.formats.gguf_reader import GGUFFile
from hybridlm.formats.names import Spec, specs
from hybridlm.formats.policy import MIXES, recipe, tensor_type
from hybridlm.quantize.importance import Importance, collect

Choice = Callable[[Spec], "GGMLType | None"]  # None: float32
T = GGMLType
ROLES = ("attn_q", "attn_k", "attn_v", "attn_gate", "ssm_out", "attn_output", "ffn_gate", "ffn_up", "ffn_down",
         "token_embd", "output")
COLS = {"ssm_out": 5760, "ffn_down": 11_008}  # at 7B; 3,840 otherwise


def role(spec: Spec) -> str:
    return spec.gguf.split(".")[-2]


def layer(spec: Spec) -> int:
    return int(spec.gguf.split(".")[1]) if spec.gguf.startswith("blk.") else -1


class Model:
    """A trained model and its logits on held-out text."""

    def __init__(self, path: str, texts: list[Path], tokens: int, window: int) -> None:
        self.file = GGUFFile.open(path)
        self.config = self.file.config
        self.specs = {s.gguf: s for s in specs(self.config)}
        self.layout = Layout.of(self.config, self.file.fingerprint, "f32")
        engine = self.engine(lambda spec: None, None)
        self.documents: list[list[int]] = []
        taken = 0
        for document in documents_of(texts):
            ids = engine.tokenizer.encode(document.text[:8 * window], special=False)[:window]
            if len(ids) < 64:
                continue
            self.documents.append(ids)
            if (taken := taken + len(ids)) >= tokens:
                break
        self.tokens = taken
        self.reference = [_log_softmax(engine.logits(ids)) for ids in self.documents]

    def engine(self, choose: Choice, importance: dict[str, np.ndarray] | None) -> Engine:
        read = file_loader(self.file, "model")

        def load(name: str, shape: tuple[int, ...], matrix: bool) -> Any:
            kind = choose(self.specs[name]) if matrix else None
            return encoded(name, kind, shape, name != "token_embd.weight") if kind else read(name, shape, matrix)

        def encoded(name: str, kind: GGMLType | None, shape: tuple[int, ...], weigh: bool = True) -> Any:
            if kind is None:
                return read(name, shape, True)
            y = through(kind, self.file.array(name), importance.get(name) if importance and weigh else None)
            return native.Matrix(y.view(np.uint8).reshape(len(y), -1), int(T.F32), *shape)

        weights = bind(self.config, load)
        if self.config.tie_word_embeddings:  # as if input table and head were two, as they are in the 7B
            embed = self.specs["token_embd.weight"]
            kind = choose(replace(embed, gguf="output.weight"))
            weights = replace(weights, head=encoded(embed.gguf, kind, embed.shape))
        return Engine(weights, CPU(self.config, self.layout), self.layout, file=self.file, cache_bytes=0)

    def divergence(self, choose: Choice, importance: dict[str, np.ndarray] | None = None) -> dict[str, float]:
        engine = self.engine(choose, importance)
        divergences, agree = [], []
        for ids, p in zip(self.documents, self.reference, strict=True):
            q = _log_softmax(engine.logits(ids))
            divergences.append((np.exp(p) * (p - q)).sum(-1, dtype=np.float64))
            agree.append(p.argmax(-1) == q.argmax(-1))
        all_of_them = np.concatenate(divergences)
        return {"kl": float(all_of_them.mean()), "kl_error": float(all_of_them.std() / math.sqrt(len(all_of_them))),
                "same_top": float(np.concatenate(agree).mean())}


def through(kind: GGMLType, x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    """x after encoding and decoding, rows joined until they are whole blocks."""
    join = math.lcm(block_size(kind), x.shape[1]) // x.shape[1]
    whole = len(x) // join * join
    parts = [(x[:whole].reshape(-1, x.shape[1] * join), None if importance is None else np.tile(importance, join))]
    if whole < len(x):  # the few rows that are left over, with zero rows
        rest = np.zeros((join, x.shape[1]), np.float32)
        rest[:len(x) - whole] = x[whole:]
        parts.append((rest.reshape(1, -1), parts[0][1]))
    done = [dequantize(kind, encode(kind, part, weights), part.shape) for part, weights in parts]
    return np.ascontiguousarray(np.concatenate([y.reshape(-1, x.shape[1]) for y in done])[:len(x)], dtype=np.float32)


def bits_at_7b(choose: Choice) -> float:
    """Bits a weight of the 7B, everything counted; `choose` sees its tensors."""
    config = PRESETS["7b"]
    total = sum(nbytes(choose(s) or T.F32, math.prod(s.shape)) for s in specs(config))
    return 8 * total / config.num_parameters()


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    x -= np.log(np.exp(x).sum(-1, dtype=np.float64, keepdims=True)).astype(np.float32)
    return x


def small(spec: Spec) -> bool:
    return not spec.matrix or "ssm_alpha" in spec.gguf or "ssm_beta" in spec.gguf


def experiments(only: set[str], layers: int) -> Iterator[tuple[str, str, Choice, bool, float | None]]:
    """(experiment, what, types, with importance, bits a weight)."""
    if "types" in only:
        for kind in (T.Q4_0, T.IQ4_NL, T.Q4_K, T.Q5_0, T.Q5_K, T.Q6_K, T.Q8_0):
            for weighed in (False, True):
                def uniform(spec: Spec, kind: GGMLType = kind) -> GGMLType | None:
                    return None if small(spec) else kind
                yield "types", kind.name.lower(), uniform, weighed, 8 * nbytes(kind, 256) / 256
    if "roles" in only:
        for name in ROLES:
            def one(spec: Spec, name: str = name) -> GGMLType | None:
                return T.Q4_K if role(spec) == name else None
            yield "roles", name, one, True, None
        for i in range(layers):
            def at(spec: Spec, i: int = i) -> GGMLType | None:
                return T.Q4_K if layer(spec) == i and not small(spec) else None
            yield "roles", f"layer {i}", at, True, None
    for group, names in (("mixes", tuple(MIXES)), ("plain", ("q4_0", "iq4_nl", "q4_k", "q5_k", "q6_k"))):
        for name in names if group in only else ():
            for weighed in (False, True):
                def mixed(spec: Spec, name: str = name) -> GGMLType | None:
                    shape = (spec.shape[0], COLS.get(role(spec), 3840)) if len(spec.shape) > 1 else spec.shape
                    return tensor_type(spec.gguf, shape, recipe(name), tied=False)
                yield group, name, mixed, weighed, bits_at_7b(mixed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", type=Path, nargs="+")
    parser.add_argument("--calibrate", type=Path, nargs="+", required=True, help="text for importance, not held out")
    parser.add_argument("--importance", type=Path, help="where to keep it")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--calibration-tokens", type=int, default=32_768)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="types,roles,mixes,plain")
    args = parser.parse_args()
    native.set_threads(args.threads)
    if args.importance and args.importance.exists():
        importance = Importance.load(args.importance)
    else:
        importance = collect(args.model, args.calibrate, args.importance, tokens=args.calibration_tokens)
    model = Model(args.model, args.text, args.tokens, args.window)
    print(f"{model.tokens} tokens of {len(model.documents)} documents; {model.config.num_parameters():,} parameters")
    print(f"{'':6} {'':24}{'importance':>11}{'bits at 7B':>12}{'mean KL':>12}{'+-':>10}{'same top':>10}")
    results = []
    for group, what, choose, weighed, bits in experiments(set(args.only.split(",")), model.config.num_hidden_layers):
        started = time.monotonic()
        result = model.divergence(choose, importance.weights() if weighed else None)
        results.append({"experiment": group, "what": what, "importance": weighed, "bits_at_7b": bits, **result,
                        "seconds": round(time.monotonic() - started, 1)})
        print(f"{group:6} {what:24}{'yes' if weighed else 'no':>11}{'' if bits is None else f'{bits:.2f}':>12}"
              f"{result['kl']:12.2e}{result['kl_error']:10.1e}{result['same_top']:10.4f}", flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
