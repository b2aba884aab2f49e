"""Run folders as `hybridlm train` leaves them, with curves of a known law."""

import json
import math
from pathlib import Path

from hybridlm.config import HybridConfig


def write_run(path: Path, *, law=lambda tokens: 2.0 + 30.0 * tokens**-0.2, steps=400, batch=1000, twin=False,
              size="tiny", schedule="wsd", periods=1, decay=0.1, drop=0.1, val=True, result=True, unique=None,
              jitter=0.0) -> Path:
    """`periods` > 1 is WSD-S: each ends with a decay, which lowers the loss by `drop`; after it the loss returns."""
    path.mkdir(parents=True)
    config = HybridConfig.preset(size)
    recipe = {"model": (config.twin() if twin else config).to_dict(), "schedule": schedule, "lr": 1e-3}
    (path / "recipe.json").write_text(json.dumps(recipe))
    lines, loss = [], 0.0
    ends = [round(steps * 2.0 ** (k - periods + 1)) for k in range(periods)]
    for step in range(1, steps + 1):
        tokens = step * batch
        end = next(e for e in ends if step <= e)
        length = max(1, round(decay * end))
        left = min(1.0, (end - step) / length)
        rate = 0.5 * (1 + math.cos(math.pi * step / steps)) if schedule == "cosine" else min(left, step / 10)
        loss = law(tokens) - drop * (1 - (rate if schedule == "cosine" else left)) + jitter * math.sin(step * 12.9898)
        record = {"step": step, "loss": loss, "lr": 1e-3 * rate, "grad_norm": 1.0, "tokens": tokens,
                  "tokens_per_s": 1e5, "seconds": step * 0.01}
        if val and (step % 20 == 0 or step == end):
            record["val_bits_per_byte"] = loss / 3
        lines.append(json.dumps(record))
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    if result:
        bits = {"all": loss / 3, "code": loss / 4, "books": loss / 2.5}
        (path / "result.json").write_text(json.dumps({"steps": steps, "tokens": steps * batch, "seconds": steps * 0.01,
                                                      "val_bits_per_byte": bits}))
    if unique:
        (path / "tokens").mkdir()
        (path / "tokens" / "manifest.json").write_text(json.dumps({"shards": [
            {"tokens": unique, "files": {"train-00000.bin": "x"}}, {"tokens": 7, "files": {"val-00000.bin": "x"}}]}))
    return path
