"""Our encoders beside llama.cpp's on the same tensors: relative root mean squared errors by gguf-py's decoder.

The tensors are Gaussian, heavy-tailed (Student's t, 4 degrees), and, given a model, its own matrices, rows joined until
they are whole blocks of 256. They go to `llama-quantize --pure` in a file that looks like a llama model. With an
importance matrix the error is weighed by it. `ratio` is ours over theirs, 1.02 being the worst that we accept. Prints a
table and one line of JSON.

    python benchmarks/encoders.py PATH/TO/llama-quantize [--model f32.gguf] [--types q4_0,q4_k]
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import tempfile
from pathlib import Path

import gguf
import numpy as np

from hybridlm.formats.blocks import GGMLType
from hybridlm.formats.encode import encode
from hybridlm.formats.gguf_reader import GGUFFile
from hybridlm.quantize.importance import Importance

TYPES = ("q4_0", "q5_0", "q8_0", "iq4_nl", "q4_k", "q5_k", "q6_k")
PEER_NAMES = {"q4_k": "Q4_K_S", "q5_k": "Q5_K_S"}
ROWS, COLS = 256, 4096


def tensors(model: str | None) -> dict[str, tuple[str, np.ndarray]]:
    """GGUF name -> (what it is, float32 matrix)."""
    rng = np.random.default_rng(0)
    made = {"gaussian": rng.standard_normal((ROWS, COLS)), "heavy tails": rng.standard_t(4, (ROWS, COLS))}
    if model:
        with GGUFFile.open(model) as file:
            last = sum(name.endswith(".ffn_down.weight") for name in file.tensors) - 1
            for role in ("attn_q", "attn_v", "attn_gate", "ssm_out", "ffn_up", "ffn_down"):
                for layer in (0, last):
                    name = f"blk.{layer}.{role}.weight"
                    if name in file.tensors:
                        x = file.array(name)
                        join = math.lcm(256, x.shape[1]) // x.shape[1]
                        made[name.removesuffix(".weight")] = x[: len(x) // join * join].reshape(-1, x.shape[1] * join)
    return {f"blk.{i}.ffn_up.weight": (what, x.astype(np.float32)) for i, (what, x) in enumerate(made.items())}


def write(path: Path, held: dict[str, tuple[str, np.ndarray]]) -> None:
    """A file that llama-quantize takes for a model."""
    w = gguf.GGUFWriter(path, "llama")
    for add, value in ((w.add_context_length, 512), (w.add_embedding_length, COLS), (w.add_block_count, len(held)),
                       (w.add_feed_forward_length, ROWS), (w.add_head_count, 8), (w.add_head_count_kv, 8),
                       (w.add_rope_dimension_count, COLS // 8), (w.add_vocab_size, 32)):
        add(value)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_tokenizer_model("none")
    for name, (_, x) in held.items():
        w.add_tensor(name, x)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def error(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> float:
    x = x.astype(np.float64)
    return float(np.sqrt((((y - x) ** 2) * weights).sum() / (x**2 * weights).sum()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary", type=Path)
    parser.add_argument("--model", help="an f32 GGUF of a trained model")
    parser.add_argument("--types", default=",".join(TYPES))
    args = parser.parse_args()
    held = tensors(args.model)
    rng = np.random.default_rng(1)
    importance = Importance(source=("random",), windows=1, window=1)
    for name, (_, x) in held.items():  # spread over two or three orders of magnitude, as measured ones are
        importance.sums[name] = np.exp(rng.standard_normal(x.shape[1]) * 1.2)
        importance.counts[name] = 1
    results = []
    with tempfile.TemporaryDirectory() as folder:
        source, target, matrix = (Path(folder) / f"{n}.gguf" for n in ("source", "target", "importance"))
        write(source, held)
        importance.save(matrix)
        print(f"{'type':8}{'tensor':20}{'importance':>11}{'ours':>12}{'llama.cpp':>12}{'ratio':>8}")
        for kind in args.types.split(","):
            for weighed in (False, True):
                command = [args.binary, "--pure", *(["--imatrix", matrix] if weighed else []), source, target,
                           PEER_NAMES.get(kind, kind.upper()), "1"]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
                theirs = {t.name: t for t in gguf.GGUFReader(target).tensors}
                for name, (what, x) in held.items():
                    peer = theirs[name]
                    assert peer.tensor_type.name.lower() == kind.lower(), (kind, peer.tensor_type)
                    weights = importance.weights()[name] if weighed else np.ones(x.shape[1], np.float32)
                    ours = encode(GGMLType[kind.upper()], x, weights if weighed else None)
                    decoded = [gguf.quants.dequantize(np.asarray(raw), peer.tensor_type) for raw in (ours, peer.data)]
                    errors = [error(x, y.reshape(x.shape), weights) for y in decoded]
                    results.append({"type": kind, "tensor": what, "importance": weighed, "ours": round(errors[0], 6),
                                    "llama.cpp": round(errors[1], 6), "ratio": round(errors[0] / errors[1], 4)})
                    print(f"{kind:8}{what:20}{'yes' if weighed else 'no':>11}{errors[0]:12.5f}{errors[1]:12.5f}"
                          f"{errors[0] / errors[1]:8.3f}", flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
