"""hybridlm as a model of lm-evaluation-harness (0.4.13 and later).

    python -m hybridlm.evals.lm_eval --model hybridlm --model_args path=model.gguf --tasks arc_easy,lambada_openai

is the harness's own command line with our model added, for it finds models of other packages only once they are
imported; in Python `import hybridlm.evals.lm_eval` does it. Nothing else imports this file.

Model arguments: path (a GGUF file, folder or hub repository), threads, kv_type, device, max_length, exact=True (float32
activations, to compare with other float32 programs), backend=torch (the PyTorch model of a folder).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from hybridlm.errors import ConfigError

__all__ = ["HybridLMModel"]

_AT_ONCE = 2048  # requests of one call, in the harness's order, in which neighbours share their beginnings
_LOG = logging.getLogger("hybridlm")


@register_model("hybridlm")
class HybridLMModel(TemplateLM):
    """The harness's three questions, answered by an engine or a `TorchScorer`."""

    def __init__(self, path: str = "", *, pretrained: str = "", backend: str = "engine", threads: int | None = None,
                 kv_type: str = "f16", device: str | None = None, max_length: int | None = None, exact: bool = False,
                 max_gen_toks: int = 256, batch_size: Any = None, max_batch_size: Any = None) -> None:
        """`batch_size` and `max_batch_size` are taken because the harness passes them; passes are filled anyhow."""
        super().__init__()
        path = path or pretrained
        if not path:
            raise ConfigError("path: give a model, --model_args path=MODEL")
        self.max_gen_toks = max_gen_toks
        if backend == "torch":
            from hybridlm.evals.torch_scorer import open_scorer

            self.scorer: Any = open_scorer(path, device=device or "cpu")
            if max_length:
                self.scorer.context = max_length
            self.chat: Any = None
        elif backend == "engine":
            from hybridlm.engine import Engine
            from hybridlm.store import resolve

            self.scorer = Engine.open(resolve(path), device=_place(device), threads=threads, kv_type=kv_type,
                                      context=max_length, exact=exact, cache_bytes=1 << 28)
            self.chat = self.scorer.chat_template
        else:
            raise ConfigError(f"backend: {backend!r} is unknown; there are engine and torch")
        self.tokens = self.scorer.tokenizer
        if self.tokens is None or self.tokens.eos is None:
            raise ConfigError(f"{path}: has no tokenizer that names an end-of-text token, which the harness needs")
        self.path = path

    @property
    def eot_token_id(self) -> int:
        return int(self.tokens.eos)

    @property
    def max_length(self) -> int:
        return int(self.scorer.context)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokens.fingerprint)

    def get_model_info(self) -> dict[str, Any]:
        from hybridlm import __version__

        return {"hybridlm": __version__, "path": self.path, "model": repr(self.scorer)}

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **rest: Any) -> list[int]:
        ids: list[int] = self.tokens.encode(string, add_special_tokens=bool(add_special_tokens))
        return ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if self.chat is None:
            raise ConfigError(f"{self.path}: has no chat template; leave --apply_chat_template out")
        return str(self.chat.render(chat_history, add_generation_prompt=add_generation_prompt))

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return "" if self.chat is None or not chat_template else "the model's own"

    def _loglikelihood_tokens(self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
                              disable_tqdm: bool = False, **rest: Any) -> list[tuple[float, bool]]:
        """Texts longer than the context lose their beginning, as in the harness's own models."""
        found: list[tuple[float, bool]] = []
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests") as bar:
            for at in range(0, len(requests), _AT_ONCE):
                part = requests[at:at + _AT_ONCE]
                answers = self.scorer.continuations([self._cut(a, b) for _, a, b in part])
                for (texts, _, _), answer in zip(part, answers, strict=True):
                    if texts is not None:
                        self.cache_hook.add_partial("loglikelihood", texts, answer)
                found += answers
                bar.update(len(part))
        return found

    def _cut(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        if len(context) + len(continuation) - 1 > self.max_length:
            _LOG.warning("a text of %d tokens loses its beginning: the context is %d",
                         len(context) + len(continuation), self.max_length)
            text = [*context, *continuation][-(self.max_length + 1):]
            kept = min(len(continuation), len(text) - 1)
            return text[:-kept], text[-kept:]
        return context, continuation

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Whole texts, in the harness's own windows."""
        found = []
        for request in tqdm(requests, disable=disable_tqdm, desc="Running loglikelihood_rolling requests"):
            (text,) = request.args
            windows = map(make_disjoint_window, get_rolling_token_windows(
                self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1))
            parts = self.scorer.continuations(list(windows))
            total = sum(logprob for logprob, _ in parts)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
            found.append(total)
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        groups: dict[tuple[Any, ...], list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(self._options(request.args[1]), []).append(i)
        found = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running generate_until requests") as bar:
            for (stop, most, temperature, top_p), numbers in groups.items():
                for at in range(0, len(numbers), 16):
                    part = numbers[at:at + 16]
                    prompts = [self.tok_encode(requests[i].args[0])[-(self.max_length - most):] for i in part]
                    if temperature:
                        texts = [self._sample(p, most, stop, temperature, top_p, i)
                                 for p, i in zip(prompts, part, strict=True)]
                    else:
                        texts = self.scorer.generate_until(prompts, most, stop)
                    for i, text in zip(part, texts, strict=True):
                        found[i] = text
                        self.cache_hook.add_partial("generate_until", requests[i].args, text)
                    bar.update(len(part))
        return found

    def _options(self, options: dict[str, Any]) -> tuple[tuple[str, ...], int, float, float]:
        until = options.get("until") or ()
        stop = (until,) if isinstance(until, str) else tuple(until)
        most = int(options.get("max_gen_toks") or options.get("max_new_tokens") or self.max_gen_toks)
        sampled = options.get("do_sample", float(options.get("temperature") or 0) > 0)
        temperature = float(options.get("temperature") or 1.0) if sampled else 0.0
        return tuple(s for s in stop if s), min(most, self.max_length - 1), temperature, float(options.get("top_p", 1))

    def _sample(self, prompt: list[int], most: int, stop: tuple[str, ...], temperature: float, top_p: float,
                seed: int) -> str:
        written = self.scorer.generate(prompt, max_tokens=most, temperature=temperature, top_p=top_p, stop=stop,
                                       seed=seed)
        return "".join(piece.text for piece in written)


def _place(device: str | None) -> str:
    """The harness passes cuda:0 or mps when nobody asked for it: taken where it can be."""
    torch = sys.modules.get("torch")  # imported by the harness
    if device and device.startswith("cuda") and torch is not None and torch.cuda.is_available() \
            and find_spec("hybridlm.engine.cuda"):
        return device
    return "cpu"


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
