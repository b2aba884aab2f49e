"""Constrained output always parses, whatever the model; what it costs; tool calls and thoughts taken apart."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.server.scripted import TOKENIZER, scripted_engine

from hybridlm.engine import Sampler
from hybridlm.engine.scheduler import Scheduler
from hybridlm.engine.writer import Writer
from hybridlm.server.constraint import ConstraintError, Grammar, tools_grammar
from hybridlm.server.tools import CLOSE, OPEN, Call, Splitter, parse_calls, with_tools, written_calls


@pytest.fixture(scope="module")
def engine():
    return scripted_engine(cache_bytes=0)


@pytest.fixture(scope="module")
def grammar(engine):
    return Grammar(engine, engine.eos)


def write(engine, matchers, max_tokens=400, temperature=1.0):
    """Outputs under constraints, side by side: (text, finish)."""
    scheduler = Scheduler(engine)
    streams = [scheduler.submit(Writer(engine, [5, 6, 7 + i % 50], Sampler(temperature, seed=i), max_tokens=max_tokens,
                                       eos=engine.eos, constraint=m)) for i, m in enumerate(matchers)]
    for stream in streams:
        for _ in stream:
            pass
    scheduler.close()
    return [(s.writer.text, s.writer.finish_reason) for s in streams]


def random_schema(rng, depth=0):
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const"]
    kinds += ["object", "array", "anyOf"] * (2 if depth < 3 else 0)
    kind = rng.choice(kinds)
    if kind == "string":
        return {"type": "string", **rng.choice([{}, {"maxLength": rng.randint(0, 9)}, {"pattern": "^[a-f]{2,5}$"},
                                                {"format": rng.choice(["date", "uuid", "ipv4"])}])}
    if kind == "integer":
        low = rng.randint(-50, 50)
        return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 1000)}
    if kind == "number":
        return {"type": "number", "minimum": 0, "maximum": 1}
    if kind in ("boolean", "null"):
        return {"type": kind}
    if kind == "enum":
        return {"enum": rng.sample(["a", "b c", 'd"e', "\\", "é\n", 1, 2.5, None, True, "<think>"], rng.randint(1, 4))}
    if kind == "const":
        return {"const": rng.choice(["x", 7, False, None])}
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth + 1) for _ in range(rng.randint(1, 3))]}
    if kind == "array":
        return {"type": "array", "items": random_schema(rng, depth + 1), "minItems": rng.randint(0, 2),
                "maxItems": rng.randint(2, 4)}
    names = rng.sample(["a", "b", "long name", "é", "x-y", "_", "0"], rng.randint(0, 4))
    return {"type": "object", "properties": {n: random_schema(rng, depth + 1) for n in names},
            "required": [n for n in names if rng.random() < 0.6], "additionalProperties": False}


def check_schemas(engine, grammar, count):
    jsonschema = pytest.importorskip("jsonschema")
    rng = random.Random(count)
    schemas = [random_schema(rng) for _ in range(count)]
    finished = 0
    for at in range(0, count, 50):
        part = schemas[at:at + 50]
        for schema, (text, finish) in zip(part, write(engine, [grammar.matcher("json_schema", s) for s in part]),
                                          strict=True):
            if finish == "length":
                continue
            finished += 1
            jsonschema.validate(json.loads(text), schema)
    assert finished > 0.8 * count


def test_what_finishes_matches_its_schema(engine, grammar):
    check_schemas(engine, grammar, 30)


@pytest.mark.slow
def test_what_finishes_matches_its_schema_a_thousand_times(engine, grammar):
    check_schemas(engine, grammar, 1000)


def test_json_regex_choice_grammars(engine, grammar):
    import re

    matchers = [grammar.matcher("json", None) for _ in range(5)]
    matchers += [grammar.matcher("regex", r"[0-9]{3}-[a-f]+x") for _ in range(5)]
    matchers += [grammar.matcher("choice", ["yes", 'n"o']) for _ in range(5)]
    matchers += [grammar.matcher("gbnf", 'root ::= "ab" ("c" | "d")+ "e"') for _ in range(5)]
    matchers += [grammar.matcher("lark", 'start: "q" /[xyz]{2}/') for _ in range(5)]
    texts = write(engine, matchers)
    for i, (text, finish) in enumerate(texts):
        if finish == "length":
            continue
        assert finish == "eos"
        if i < 5:
            assert isinstance(json.loads(text), dict)
        else:
            assert re.fullmatch([r"[0-9]{3}-[a-f]+x", 'yes|n"o', "ab[cd]+e", "q[xyz]{2}"][i // 5 - 1], text), text
    assert sum(finish == "eos" for _, finish in texts) > 20


def test_a_constraint_begins_behind_thoughts(engine, grammar):
    m = grammar.matcher("choice", ["yes"], after=("</think>",))
    for token in TOKENIZER.encode("some thoughts </thi"):
        assert m.allowed() is None and not m.push(token)
    for token in TOKENIZER.encode("nk>"):
        m.push(token)
    assert m.allowed().sum() < 10


@pytest.mark.parametrize("kind,value", [
    ("regex", "(["), ("regex", ""), ("lark", "start: foo"), ("lark", "%"), ("gbnf", "x"), ("json_schema", []),
    ("json_schema", {"type": "wat"}), ("json_schema", {"$ref": "http://example.org/x"}), ("choice", []),
    ("choice", [""]), ("choice", [3]), ("regex", "a" * 300_000), ("lark", 7)])
def test_what_cannot_be_compiled_is_refused(grammar, kind, value):
    with pytest.raises(ConstraintError, match=f"^{kind}: "):
        grammar.matcher(kind, value)


TOOLS = [{"name": "get_weather", "parameters": {
    "type": "object", "required": ["city"], "properties": {
        "city": {"type": "string", "maxLength": 6}, "days": {"$ref": "#/$defs/n"}, "unit": {"enum": ["C", "F"]}},
    "$defs": {"n": {"type": "integer", "minimum": 0, "maximum": 9}}}}, {"name": "now"}]


def test_forced_calls_parse_and_fit(engine, grammar):
    texts = write(engine, [grammar.matcher("lark", tools_grammar(grammar, TOOLS, None)) for _ in range(30)], 600)
    finished = [text for text, finish in texts if finish == "eos"]
    assert len(finished) > 20
    for text in finished:
        assert text.startswith(OPEN) and text.endswith(CLOSE)
        for call in parse_calls(text[len(OPEN):-len(CLOSE)]):
            assert call.name in ("get_weather", "now")
            if call.name == "get_weather":
                assert len(call.arguments["city"]) <= 6 and 0 <= call.arguments.get("days", 0) <= 9
    for text, finish in write(engine, [
            grammar.matcher("lark", tools_grammar(grammar, TOOLS, "now")) for _ in range(3)]):
        assert (text, finish) == (OPEN + "now()" + CLOSE, "eos")


def test_a_free_answer_is_bound_once_it_opens_a_call(grammar):
    def bound():
        return grammar.matcher("lark", tools_grammar(grammar, TOOLS, None, opened=True), after=("</think>", OPEN))

    def feed(m, text):
        """Whether the output is over; None once a token is not allowed."""
        for token in TOKENIZER.encode(text):
            allowed = m.allowed()
            if allowed is not None and not allowed[token]:
                return None
            if m.push(token):
                return True
        return False

    assert feed(bound(), f"I may use {OPEN}nonsense( here</think>and say anything <function") is False
    for call in ('get_weather(city="Rome")', 'get_weather(days=3, unit="C", city="Rome")', "now()",
                 'now()\nget_weather(city="Oslo", unit="F")'):
        m = bound()
        assert feed(m, f"hm</think>Let me see. {OPEN}") is False and m.allowed() is not None
        assert feed(m, call + CLOSE) is True, call
    for call in ("get_weather()", "get_weather(days=3)", "get_weather(city=5)", 'get_weather(city="a", city="b")',
                 "nope()", 'now(x=1)', "some text"):
        m = bound()
        feed(m, f"</think>{OPEN}")
        assert feed(m, call + CLOSE) is None, call


def test_many_arguments_come_in_the_order_of_the_schema(grammar):
    tool = {"name": "f", "parameters": {"properties": {k: {"type": "integer"} for k in "abcdefgh"}, "required": ["c"]}}
    for call, fits in (("f(a=1, c=2, h=3)", True), ("f(c=2)", True), ("f(c=2, a=1)", False), ("f(a=1)", False)):
        m, over = grammar.matcher("lark", tools_grammar(grammar, [tool], "f")), False
        for token in TOKENIZER.encode(OPEN + call + CLOSE):
            if not m.allowed()[token]:
                break
            over = m.push(token)
        assert over == fits, call


# -- calls and thoughts ----------------------------------------------------------------------------------------------


def test_calls_as_models_write_them():
    assert parse_calls("f()") == [Call("f", {})]
    assert parse_calls("\n f(a=1, b='x)', c=[1, true, {'k': None}],)\ng(x=-2.5e3)\n") == [
        Call("f", {"a": 1, "b": "x)", "c": [1, True, {"k": None}]}), Call("g", {"x": -2500.0})]
    assert parse_calls('f(s="a\\u00e9\\n", t="\\ud83d\\ude00")') == [Call("f", {"s": "aé\n", "t": "😀"})]
    assert parse_calls("a.b-c(x-y=null)") == [Call("a.b-c", {"x-y": None})]
    for bad in ("", "  ", "hello", "f(", "f(1)", "f(a=)", "f(a=1 b=2)", "f(a=g())", "f(a=__import__('os'))", "f(a=1",
                "f(a=1e999)", "f(a=" + "[" * 3000, "f(a={1,2})", "f(a=b'x')"):
        assert parse_calls(bad) is None, bad


VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
                      | st.text(st.characters(exclude_categories=["Cs"])),
                      lambda c: st.lists(c, max_size=3) | st.dictionaries(st.text(
                          st.characters(exclude_categories=["Cs"]), max_size=4), c, max_size=3), max_leaves=6)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.dictionaries(st.from_regex(r"[a-z][\w-]{0,5}", fullmatch=True), VALUES, max_size=3), min_size=1,
                max_size=3))
def test_calls_survive_the_way_there_and_back(arguments):
    calls = [{"name": f"tool_{i}", "arguments": a} for i, a in enumerate(arguments)]
    text = written_calls(calls)
    if CLOSE in text[:-len(CLOSE)]:
        return
    assert parse_calls(text[len(OPEN):-len(CLOSE)]) == [Call(c["name"], c["arguments"]) for c in calls]


@settings(deadline=None, max_examples=300)
@given(st.lists(st.sampled_from(["<think>", "</think>", OPEN, CLOSE, "f(a=1)", "x", "\n", " ", "<", "</"]),
                max_size=12), st.booleans(), st.randoms())
def test_taking_apart_does_not_depend_on_how_text_arrives(words, thinking, rng):
    text = "".join(words)

    def apart(chunks):
        splitter, out = Splitter(thinking, True), []
        for chunk in chunks:
            out += splitter.push(chunk)
        out += splitter.finish()
        joined = []
        for kind, value in out:
            if kind != "calls" and joined and joined[-1][0] == kind:
                joined[-1] = (kind, joined[-1][1] + value)
            else:
                joined.append((kind, value))
        return joined

    chunks, at = [], 0
    while at < len(text):
        n = rng.randint(1, 7)
        chunks.append(text[at:at + n])
        at += n
    assert apart(chunks) == apart([text])


def test_templates_that_know_no_tools_are_told_in_text():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "1", "content": "2"}]
    out = with_tools(messages, TOOLS, "no such word")
    assert [m["role"] for m in out] == ["system", "user", "assistant", "environment"]
    assert "<functions>" in out[0]["content"] and out[2]["content"] == OPEN + "f(a=1)" + CLOSE
    assert with_tools(messages, TOOLS, "{{ tools }}") == messages
