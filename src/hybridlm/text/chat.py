"""Chat templates: a list of messages -> the text a model was tuned on.

Templates come with models, from strangers, so they run in jinja2's immutable sandbox, with the names and filters that
Hugging Face gives them. A template that fails says so in one sentence. A model without one has no chat format at all:
`ChatTemplate.from_folder` returns None then, and callers offer completion.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from hybridlm.errors import FormatError, HybridLMError
from hybridlm.text.tokenizer import _content, _read_config

__all__ = ["CHATML", "ChatTemplate", "ChatTemplateError"]

MAX_TEMPLATE_CHARS = 1 << 20
MAX_RENDERED_CHARS = 64 << 20

# ChatML, the format of our own instruct models: one turn per message, nothing added where no system message is given.
CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string %}
{{- message['content'] }}
{%- else %}
{%- for part in message['content'] or [] %}
{{- part['text'] }}
{%- endfor %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


class ChatTemplateError(HybridLMError):
    """A chat template that is damaged, refuses these messages, or tried to leave its sandbox."""


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks assistant text for training masks; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's interface

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """The immutable sandbox, and no multiplication that could fill the memory."""

    intercepted_binops = frozenset({"*", "**"})

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        """What a forbidden attribute becomes. jinja2 renders it as nothing; Python's inner names are refused aloud."""
        if attribute.startswith("_"):
            raise SecurityError(f"access to attribute {attribute!r}")
        return super().unsafe_undefined(obj, attribute)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" or not isinstance(left, int | float) or not isinstance(right, int | float):
            sizes = [len(v) if isinstance(v, str | bytes | list | tuple) else abs(v) for v in (left, right)]
            if sizes[0] * sizes[1] > (4096 if operator == "**" else MAX_TEMPLATE_CHARS):
                raise SecurityError("a product too large for a chat template")
        return super().call_binop(context, operator, left, right)


class ChatTemplate:
    """One Jinja template with the special tokens it may name. Raises `ChatTemplateError` when it does not compile."""

    def __init__(self, source: str, *, special_tokens: Mapping[str, str] | None = None) -> None:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise ChatTemplateError("chat template: larger than 1 MB, which no real template is")
        self.source = source
        self.special_tokens = dict(special_tokens or {})
        _ = self._template  # a damaged template is refused when opened, not in the middle of a conversation

    @classmethod
    def chatml(cls) -> ChatTemplate:
        """The format of our own instruct models."""
        return cls(CHATML)

    @classmethod
    def from_folder(cls, folder: str | Path) -> ChatTemplate | None:
        """The template of a model folder: `chat_template.jinja`, else "chat_template" in `tokenizer_config.json`.

        None when the model has no template.
        """
        folder = Path(folder)
        config = _read_config(folder / "tokenizer_config.json")
        tokens = {key: text for key in ("bos_token", "eos_token", "pad_token", "unk_token")
                  if (text := _content(config.get(key))) is not None}
        file = folder / "chat_template.jinja"
        if file.is_file():
            try:
                return cls(file.read_text(encoding="utf-8"), special_tokens=tokens)
            except (OSError, UnicodeDecodeError) as error:
                raise FormatError(f"{file}: cannot be read ({error})") from None
        source = config.get("chat_template")
        if isinstance(source, list):  # several named templates
            named = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
            source = named.get("default") or next(iter(named.values()), None)
        return cls(source, special_tokens=tokens) if isinstance(source, str) and source else None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt text of a conversation.

        Args:
            messages: dicts with "role" and "content" and whatever else the template reads.
            add_generation_prompt: end with the opening of an assistant turn.
            tools: JSON schemas of callable functions, as the template expects them.
            variables: further names that the template reads, e.g. `enable_thinking`.

        Encode the result with `Tokenizer.encode(text, special=True)`.
        """
        for i, message in enumerate(messages):
            if not isinstance(message, Mapping) or "role" not in message:
                raise ChatTemplateError(f'messages: entry {i} must be an object with "role" and "content"')
        values: dict[str, Any] = {**self.special_tokens, **variables, "messages": [dict(m) for m in messages],
                                  "tools": list(tools) if tools else None, "documents": None,
                                  "add_generation_prompt": add_generation_prompt}
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(values):
                size += len(piece)
                if size > MAX_RENDERED_CHARS:
                    raise ChatTemplateError("chat template: the rendered prompt grows without end")
                pieces.append(piece)
        except SecurityError as error:
            raise ChatTemplateError(f"chat template: tried something that its sandbox forbids ({error})") from None
        except TemplateError as error:
            raise ChatTemplateError(f"chat template: {error}") from None
        except (TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError, RecursionError) as error:
            raise ChatTemplateError(f"chat template: cannot render these messages ({error})") from None
        return "".join(pieces)

    @cached_property
    def _template(self) -> Any:
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            return environment.from_string(self.source)
        except (TemplateError, RecursionError) as error:
            raise ChatTemplateError(f"chat template: does not compile ({error})") from None


def _raise_exception(message: str) -> None:
    raise TemplateError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None,
             separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    """Plain JSON: jinja2's own filter escapes HTML, which models never saw."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
