"""Constrained output: JSON schemas, regular expressions and grammars as token masks, by llguidance.

A mask is computed from the grammar's state and the tokenizer's trie before each token and given to the sampler, so what
finishes always matches. Where a model thinks aloud first, the constraint begins after its thoughts; where it may call
tools, after it has begun to.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hybridlm.errors import HybridLMError
from hybridlm.server.tools import CLOSE, OPEN

if TYPE_CHECKING:
    from hybridlm.engine import Engine

__all__ = ["ConstraintError", "Grammar", "Matcher", "tools_grammar"]

MAX_GRAMMAR_CHARS = 200_000
ANY_ORDER = 5  # arguments of a tool that may come in any order; of more, in the schema's
# One way to put blanks, or a model that likes them could go on with nothing else until its tokens are used up.
JSON_STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class ConstraintError(HybridLMError):
    """A schema, expression or grammar that cannot be used."""


class Grammar:
    """Compiles grammars for one model's tokenizer."""

    def __init__(self, engine: Engine, ends: Sequence[int]) -> None:
        """`ends`: the tokens that end an output."""
        from llguidance import LLTokenizer

        self.engine = engine
        self.vocab = engine.config.vocab_size
        if not ends:
            raise ConstraintError("constrained output: this model has no token that ends a text")
        try:
            self.tokenizer = LLTokenizer(engine.tokenizer.to_json(), n_vocab=self.vocab, eos_token=list(ends))
        except (ValueError, RuntimeError) as error:
            raise ConstraintError(f"constrained output: this model's tokenizer does not allow it ({error})") from None

    def matcher(self, kind: str, value: Any, *, after: Sequence[str] = ()) -> Matcher:
        """
        Args:
            kind: "json" (any object), "json_schema", "regex", "lark", "gbnf" or "choice" (a list of texts).
            after: texts (the end of thoughts, the opening of calls) that the model must have written, one after the
                other, for the constraint to begin; none for at once.

        Raises `ConstraintError` for what cannot be compiled.
        """
        from llguidance import LLMatcher

        try:
            text = _compiled(kind, value)
        except Exception as error:  # the compilers have errors of their own, all about the text they were given
            raise ConstraintError(f"{kind}: cannot be used ({_line(error)})") from None
        if len(text) > MAX_GRAMMAR_CHARS:
            raise ConstraintError(f"{kind}: larger than {MAX_GRAMMAR_CHARS} characters")
        matcher = LLMatcher(self.tokenizer, text, log_level=0)
        if matcher.is_error():
            raise ConstraintError(f"{kind}: cannot be used ({_line(matcher.get_error())})")
        return Matcher(matcher, self, after)

    def quoted(self, text: str) -> str:
        """A text in a Lark grammar: a special token by its name, anything else as a string."""
        if self.engine.tokenizer.token_to_id(text) in self.engine.tokenizer.special_ids:
            return text
        return json.dumps(text)


class Matcher:
    """`engine.writer.Constraint` of one output."""

    def __init__(self, matcher: Any, grammar: Grammar, after: Sequence[str]) -> None:
        from hybridlm.text.stream import StreamDecoder

        self._matcher, self._grammar, self._after = matcher, grammar, list(after)
        self._decoder = StreamDecoder(grammar.engine.tokenizer) if after else None
        self._tail = ""  # of the text that the next of `after` is looked for in
        self._free = False
        self._words = np.zeros((grammar.vocab + 31) // 32, np.uint32)

    def allowed(self) -> np.ndarray | None:
        if self._decoder is not None or self._free:
            return None
        self._matcher.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
        if self._matcher.is_error():
            raise ConstraintError(f"constraint: too complex ({_line(self._matcher.get_error())})")
        bits = np.unpackbits(self._words.view(np.uint8), bitorder="little")
        return bits[:self._grammar.vocab].view(bool)

    def push(self, token: int) -> bool:
        if self._decoder is not None:
            self._look_for_the_beginning(self._decoder.push(token))
            return False
        if self._free:
            return False
        if not self._matcher.consume_token(token):
            raise ConstraintError(f"constraint: cannot go on ({_line(self._matcher.get_error())})")
        return bool(self._matcher.is_stopped())


    def _look_for_the_beginning(self, text: str) -> None:
        self._tail += text
        while self._after and self._after[0] in self._tail:
            self._tail = self._tail.partition(self._after.pop(0))[2]
        if self._after:
            self._tail = self._tail[-64:]
            return
        self._decoder = None
        # A token may reach beyond the mark. If the constraint does not allow what it brought, it comes too late.
        rest = self._grammar.engine.tokenizer.encode(self._tail) if self._tail else []
        self._free = bool(rest) and not self._matcher.consume_tokens(rest)


def tools_grammar(grammar: Grammar, tools: list[dict[str, Any]], name: str | None, opened: bool = False) -> str:
    """The Lark grammar of calls in Olmo's format: of the tool `name`, or of any, one or more. `opened`: from behind
    the opening tag on."""
    wanted = [t for t in tools if name is None or t["name"] == name]
    rules = [f"start: {'blank' if opened else grammar.quoted(OPEN)} calls {'blank ' if opened else ''}"
             f"{grammar.quoted(CLOSE)}", *(["blank: /[ \\n]{0,2}/"] if opened else []),
             "calls: call" + ("" if name else ' ("\\n" call){0,15}'),
             "call: " + " | ".join(f"call{i}" for i in range(len(wanted)))]
    for i, tool in enumerate(wanted):
        schema = tool.get("parameters") or {}
        properties = schema.get("properties") or {}
        shared = {k: schema[k] for k in ("$defs", "definitions") if k in schema}
        required = set(schema.get("required") or ())
        rules.append(f"call{i}: {json.dumps(tool['name'] + '(')} args{i} \")\"")
        for j, (key, value) in enumerate(properties.items()):
            body = json.dumps({**shared, **value, "x-guidance": JSON_STYLE} if isinstance(value, dict) else {})
            rules.append(f"arg{i}x{j}: {json.dumps(key + '=')} %json {body}")
        needed = {j for j, key in enumerate(properties) if key in required}
        rules += (_any_order if len(properties) <= ANY_ORDER else _in_order)(i, len(properties), needed)
    return "\n".join(rules)


def _any_order(i: int, count: int, needed: set[int]) -> list[str]:
    """Rules for each set of arguments that may have been written so far."""
    rules = [f"args{i}: rest{i}x0"]
    for written in range(1 << count):
        comma = '", " ' if written else ""
        ways = [f"{comma}arg{i}x{j} rest{i}x{written | 1 << j}" for j in range(count) if not written >> j & 1]
        if all(written >> j & 1 for j in needed):
            ways.append('""')
        rules.append(f"rest{i}x{written}: " + " | ".join(ways))
    return rules


def _in_order(i: int, count: int, needed: set[int]) -> list[str]:
    """Rules for arguments as the schema lists them: sets of many are too many."""
    rules = [f"args{i}: first{i}x0", f'first{i}x{count}: ""', f'rest{i}x{count}: ""']
    for j in range(count):
        rules.append(f"first{i}x{j}: arg{i}x{j} rest{i}x{j + 1}" + ("" if j in needed else f" | first{i}x{j + 1}"))
        rules.append(f"rest{i}x{j}: \", \" arg{i}x{j} rest{i}x{j + 1}" + ("" if j in needed else f" | rest{i}x{j + 1}"))
    return rules


def _compiled(kind: str, value: Any) -> str:
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import gbnf_to_lark

    if kind == "json":
        return LLMatcher.grammar_from_json_schema({"type": "object"}, overrides=JSON_STYLE)
    if kind == "json_schema":
        if not isinstance(value, dict | bool):
            raise ValueError("a schema is an object")
        return LLMatcher.grammar_from_json_schema(json.dumps(value), overrides=JSON_STYLE)
    if kind == "choice":
        if not value or not all(isinstance(v, str) and v for v in value):
            raise ValueError("give one text or more, none of them empty")
        return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(v) for v in value))
    if not isinstance(value, str) or not value:
        raise ValueError("give a text that is not empty")
    if kind == "regex":
        return LLMatcher.grammar_from_regex(value)
    if kind == "gbnf" or (kind == "lark" and "::=" in value):
        return LLMatcher.grammar_from_lark(gbnf_to_lark(value))
    return LLMatcher.grammar_from_lark(value)


def _line(error: object) -> str:
    return " ".join(str(error).split())[:300]
