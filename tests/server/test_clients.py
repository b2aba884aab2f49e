"""The official clients against the server: chat, streams, tools, structured output. As their users write it."""

import json

import pytest
from pydantic import BaseModel
from tests.server.scripted import THINKING, scripted_engine, serving

WEATHER = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12},
                                            "days": {"type": "integer", "minimum": 0, "maximum": 9}},
           "required": ["city"], "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "Weather", "parameters": WEATHER}}


def script(history):
    last = history.rsplit("<|im_start|>", 1)[-1]
    if last.startswith("environment"):
        return "It is 21 there."
    if "weather" in last:
        return 'Let me look. <function_calls>\nget_weather(city="Paris", days=3)\nget_weather(city="Rome")\n' \
               "</function_calls>"
    if "count" in last:
        return "one two three four"
    return "Hello you, 日本 é!"


@pytest.fixture(scope="module")
def server():
    thinker = scripted_engine(lambda _: "let me see\n</think>\n\nthat is 12", THINKING)
    with serving({"m": scripted_engine(script), "thinker": lambda: thinker,
                  "base": lambda: scripted_engine(None, None)}) as s:
        yield s


# -- openai ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def openai(server):
    from openai import OpenAI

    with OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(text):
    return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]


def test_openai_chat(openai):
    answer = openai.chat.completions.create(model="m", messages=ask("hi"), temperature=0)
    choice = answer.choices[0]
    assert choice.message.content == "Hello you, 日本 é!" and choice.finish_reason == "stop"
    assert choice.message.tool_calls is None and answer.model == "m"
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens and usage.completion_tokens > 5
    again = openai.chat.completions.create(model="m", messages=ask("hi"), temperature=0)
    assert again.usage.prompt_tokens_details.cached_tokens >= usage.prompt_tokens - 16


def test_openai_stream(openai):
    chunks = list(openai.chat.completions.create(model="m", messages=ask("hi"), stream=True, temperature=0,
                                                 stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Hello you, 日本 é!"
    assert chunks[0].choices[0].delta.role == "assistant" and len(chunks) > 5
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage.completion_tokens > 5 and not chunks[-1].choices
    with openai.chat.completions.stream(model="m", messages=ask("hi"), temperature=0) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.content == "Hello you, 日本 é!"


@pytest.mark.parametrize("stream", [False, True])
def test_openai_tools(openai, stream):
    messages = ask("weather?")
    if stream:
        with openai.chat.completions.stream(model="m", messages=messages, tools=[TOOL], temperature=0) as s:
            for _ in s:
                pass
            choice = s.get_final_completion().choices[0]
    else:
        choice = openai.chat.completions.create(model="m", messages=messages, tools=[TOOL], temperature=0).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content.strip() == "Let me look."
    calls = [(c.function.name, json.loads(c.function.arguments)) for c in choice.message.tool_calls]
    assert calls == [("get_weather", {"city": "Paris", "days": 3}), ("get_weather", {"city": "Rome"})]
    messages.append(choice.message.to_dict())
    messages += [{"role": "tool", "tool_call_id": c.id, "content": "21"} for c in choice.message.tool_calls]
    done = openai.chat.completions.create(model="m", messages=messages, tools=[TOOL], temperature=0)
    assert done.choices[0].message.content == "It is 21 there." and done.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_openai_forced_tools_are_called_by_any_model(openai, choice):
    for seed in range(3):  # at a temperature at which the script is noise
        answer = openai.chat.completions.create(model="m", messages=ask("hi"), tools=[TOOL], tool_choice=choice,
                                                seed=seed, temperature=50, max_tokens=400)
        if answer.choices[0].finish_reason == "length":
            continue
        assert answer.choices[0].finish_reason == "tool_calls"
        for call in answer.choices[0].message.tool_calls:
            arguments = json.loads(call.function.arguments)
            assert call.function.name == "get_weather" and set(arguments) <= {"city", "days"}
            assert len(arguments["city"]) <= 12 and 0 <= arguments.get("days", 0) <= 9


class Point(BaseModel):
    x: int
    name: str


def test_openai_structured_output(openai):
    for seed in range(5):
        answer = openai.chat.completions.create(model="m", messages=ask("hi"), response_format={"type": "json_object"},
                                                seed=seed, temperature=50, max_tokens=300)
        if answer.choices[0].finish_reason == "stop":
            assert isinstance(json.loads(answer.choices[0].message.content), dict)
        schema = {"name": "p", "strict": True, "schema": {
            "type": "object", "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 999},
                                             "name": {"type": "string", "maxLength": 5}},
            "required": ["x", "name"], "additionalProperties": False}}
        answer = openai.chat.completions.create(
            model="m", messages=ask("hi"), seed=seed, temperature=50,
            response_format={"type": "json_schema", "json_schema": schema})
        Point.model_validate_json(answer.choices[0].message.content)
    parsed = openai.chat.completions.parse(model="m", messages=ask("hi"), response_format=Point, temperature=1,
                                           logit_bias={}, max_tokens=1500, seed=3)
    assert isinstance(parsed.choices[0].message.parsed, Point)
    texts = {openai.chat.completions.create(
        model="m", messages=ask("hi"), temperature=50, seed=seed,
        extra_body={"guided_choice": ["yes", "no"]}).choices[0].message.content for seed in range(12)}
    assert texts == {"yes", "no"}


def test_openai_reasoning(openai):
    answer = openai.chat.completions.create(model="thinker", messages=ask("5+7"), temperature=0)
    message = answer.choices[0].message
    assert message.content == "that is 12" and message.reasoning_content.strip() == "let me see"
    assert answer.usage.completion_tokens_details.reasoning_tokens > 3
    chunks = list(openai.chat.completions.create(model="thinker", messages=ask("5+7"), temperature=0, stream=True))
    deltas = [c.choices[0].delta for c in chunks if c.choices]
    assert "".join(d.content or "" for d in deltas) == "that is 12"
    assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas).strip() == "let me see"


def test_openai_logprobs_and_several(openai):
    answer = openai.chat.completions.create(model="m", messages=ask("hi"), temperature=0, logprobs=True, top_logprobs=2,
                                            n=2)
    assert len(answer.choices) == 2
    content = answer.choices[0].logprobs.content
    assert "".join(t.token for t in content).startswith("Hello you")
    assert all(t.logprob > -1e-3 and len(t.top_logprobs) == 2 for t in content)
    assert bytes(b for t in content for b in t.bytes).decode() == "Hello you, 日本 é!"


def test_openai_completions(openai):
    answer = openai.completions.create(model="base", prompt="the cat", max_tokens=9, seed=1, logprobs=3, echo=True)
    assert answer.choices[0].text.startswith("the cat") and answer.choices[0].finish_reason == "length"
    assert len(answer.choices[0].logprobs.tokens) == answer.usage.completion_tokens == 9
    text = "".join(c.choices[0].text for c in openai.completions.create(model="base", prompt="the cat", max_tokens=9,
                                                                       seed=1, stream=True) if c.choices)
    assert "the cat" + text == answer.choices[0].text
    many = openai.completions.create(model="base", prompt=["a", "b"], n=2, max_tokens=3)
    assert len(many.choices) == 4 and [c.index for c in many.choices] == [0, 1, 2, 3]
    stop = openai.completions.create(model="base", prompt="the cat", max_tokens=9, seed=1, stop=text[3:5])
    assert stop.choices[0].finish_reason == "stop" and stop.choices[0].text == text[:text.index(text[3:5])]
    assert openai.completions.create(model="base", prompt=[1, 2, 3], max_tokens=2).usage.prompt_tokens == 3


def test_openai_models_and_errors(openai):
    from openai import BadRequestError, NotFoundError

    assert [m.id for m in openai.models.list()] == ["m", "thinker", "base"]
    assert openai.models.retrieve("m").id == "m"
    with pytest.raises(NotFoundError, match="not served here"):
        openai.chat.completions.create(model="gpt-5", messages=ask("hi"))
    with pytest.raises(BadRequestError, match="no chat template"):
        openai.chat.completions.create(model="base", messages=ask("hi"))
    with pytest.raises(BadRequestError, match="context"):
        openai.completions.create(model="base", prompt=[1] * 5000)
    with pytest.raises(BadRequestError, match="json_schema"):
        openai.chat.completions.create(model="m", messages=ask("hi"), response_format={
            "type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "wat"}}})


# -- ollama ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def ollama(server):
    from ollama import Client

    return Client(host=server.url)


def test_ollama_chat(ollama):
    answer = ollama.chat("m", messages=ask("hi"), options={"temperature": 0})
    assert answer.message.content == "Hello you, 日本 é!" and answer.done and answer.done_reason == "stop"
    assert answer.prompt_eval_count > 5 and answer.eval_count > 5 and answer.total_duration > 0
    parts = list(ollama.chat("m:latest", messages=ask("hi"), stream=True, options={"temperature": 0}))
    assert "".join(p.message.content for p in parts) == answer.message.content and parts[-1].done
    thoughts = ollama.chat("thinker", messages=ask("5+7"), options={"temperature": 0}, think=True)
    assert thoughts.message.thinking.strip() == "let me see" and thoughts.message.content == "that is 12"


@pytest.mark.parametrize("stream", [False, True])
def test_ollama_tools_and_formats(ollama, stream):
    def get_weather(city: str, days: int = 1) -> str:
        """Weather of a city."""
        return "21"

    messages = ask("weather?")
    answer = ollama.chat("m", messages=messages, tools=[get_weather], options={"temperature": 0}, stream=stream)
    found = [m for m in (answer if stream else [answer]) if m.message.tool_calls]
    calls = [(c.function.name, dict(c.function.arguments)) for m in found for c in m.message.tool_calls]
    assert calls[0] == ("get_weather", {"city": "Paris", "days": 3})
    # This client declares all parameters as required, so the call that leaves one out is made to name it.
    assert calls[1][0] == "get_weather" and calls[1][1]["city"] == "Rome" and isinstance(calls[1][1]["days"], int)
    messages += [found[0].message, {"role": "tool", "content": "21", "tool_name": "get_weather"}]
    assert ollama.chat("m", messages=messages, options={"temperature": 0}).message.content == "It is 21 there."
    schema = {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"],
              "additionalProperties": False}
    answer = ollama.chat("m", messages=ask("hi"), format=schema, options={"temperature": 50, "seed": 1}, stream=stream)
    text = "".join(p.message.content for p in (answer if stream else [answer]))
    assert json.loads(text)["x"] in (1, 2)


def test_ollama_generate_and_models(ollama):
    from ollama import ResponseError

    assert ollama.generate("m", "hi", options={"temperature": 0}).response == "Hello you, 日本 é!"
    parts = list(ollama.generate("base", "the cat", stream=True, options={"num_predict": 6, "seed": 2}))
    assert parts[-1].done_reason == "length" and parts[-1].eval_count == 6
    assert ollama.generate("base", "").done_reason == "load"
    assert [m.model for m in ollama.list().models] == ["m", "thinker", "base"]
    assert "m" in [m.model for m in ollama.ps().models]
    shown = ollama.show("m")
    assert "tools" in shown.capabilities and shown.template
    with pytest.raises(ResponseError, match="not served"):
        ollama.show("nothing")


# -- anthropic -------------------------------------------------------------------------------------------------------


@pytest.fixture
def anthropic(server):
    from anthropic import Anthropic

    with Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def test_anthropic_messages(anthropic):
    options = {"model": "m", "max_tokens": 100, "extra_body": {"temperature": 0}, "system": "Be brief."}
    user = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    answer = anthropic.messages.create(messages=user, **options)
    assert answer.content[0].text == "Hello you, 日本 é!" and answer.stop_reason == "end_turn"
    u = answer.usage
    counted = anthropic.messages.count_tokens(model="m", messages=user, system="Be brief.").input_tokens
    assert u.input_tokens + u.cache_read_input_tokens == counted
    with anthropic.messages.stream(messages=user, **options) as stream:
        assert "".join(stream.text_stream) == "Hello you, 日本 é!"
        final = stream.get_final_message()
    assert final.stop_reason == "end_turn" and final.usage.output_tokens == u.output_tokens
    count = [{"role": "user", "content": "count"}]
    stopped = anthropic.messages.create(messages=count, **options, stop_sequences=["zzz", " three"])
    assert (stopped.content[0].text, stopped.stop_reason, stopped.stop_sequence) == ("one two", "stop_sequence",
                                                                                      " three")
    short = anthropic.messages.create(messages=count, **{**options, "max_tokens": 2})
    assert short.stop_reason == "max_tokens"
    begun = anthropic.messages.create(messages=[*count, {"role": "assistant", "content": "one two"}], **options)
    assert begun.content[0].text == " three four"


def test_anthropic_thoughts(anthropic):
    with anthropic.messages.stream(model="thinker", max_tokens=100, extra_body={"temperature": 0},
                                   messages=[{"role": "user", "content": "5+7"}]) as stream:
        final = stream.get_final_message()
    assert [b.type for b in final.content] == ["thinking", "text"]
    assert final.content[0].thinking.strip() == "let me see" and final.content[1].text == "that is 12"


@pytest.mark.parametrize("stream", [False, True])
def test_anthropic_tools(anthropic, stream):
    tools = [{"name": "get_weather", "description": "Weather", "input_schema": WEATHER}]
    messages = [{"role": "user", "content": "weather?"}]
    options = {"model": "m", "max_tokens": 200, "extra_body": {"temperature": 0}, "tools": tools}
    if stream:
        with anthropic.messages.stream(messages=messages, **options) as s:
            answer = s.get_final_message()
    else:
        answer = anthropic.messages.create(messages=messages, **options)
    assert answer.stop_reason == "tool_use" and answer.content[0].text.strip() == "Let me look."
    uses = [b for b in answer.content if b.type == "tool_use"]
    assert [u.input for u in uses] == [{"city": "Paris", "days": 3}, {"city": "Rome"}]
    messages += [{"role": "assistant", "content": answer.content},
                 {"role": "user", "content": [{"type": "tool_result", "tool_use_id": u.id, "content": "21"}
                                              for u in uses]}]
    assert anthropic.messages.create(messages=messages, **options).content[0].text == "It is 21 there."
    options |= {"extra_body": {"temperature": 50}, "max_tokens": 1000}
    forced = anthropic.messages.create(messages=[{"role": "user", "content": "hi"}], **options,
                                       tool_choice={"type": "tool", "name": "get_weather"})
    assert forced.content[0].type == "tool_use" and "city" in forced.content[0].input


def test_anthropic_structured_output_and_errors(anthropic):
    import anthropic as library

    schema = {"type": "object", "properties": {"x": {"enum": ["a", "b"]}}, "required": ["x"],
              "additionalProperties": False}
    answer = anthropic.messages.create(model="m", max_tokens=200, messages=[{"role": "user", "content": "hi"}],
                                       extra_body={"temperature": 50}, output_config={"format": {"type": "json_schema",
                                                                                 "schema": schema}})
    assert json.loads(answer.content[0].text)["x"] in ("a", "b")
    with pytest.raises(library.NotFoundError) as error:
        anthropic.messages.create(model="x", max_tokens=2, messages=[{"role": "user", "content": "hi"}])
    assert error.value.body["error"]["type"] == "not_found_error"


# -- litellm ---------------------------------------------------------------------------------------------------------


def test_litellm(server):
    litellm = pytest.importorskip("litellm")
    common = {"model": "openai/m", "api_base": server.url + "/v1", "api_key": "none", "temperature": 0}
    answer = litellm.completion(messages=ask("hi"), **common)
    assert answer.choices[0].message.content == "Hello you, 日本 é!"
    stream = litellm.completion(messages=ask("hi"), stream=True, **common)
    text = "".join(c.choices[0].delta.content or "" for c in stream)
    assert text == "Hello you, 日本 é!"
    called = litellm.completion(messages=ask("weather?"), tools=[TOOL], **common)
    assert json.loads(called.choices[0].message.tool_calls[0].function.arguments) == {"city": "Paris", "days": 3}
    schema = {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"],
              "additionalProperties": False}
    structured = litellm.completion(messages=ask("hi"), **{**common, "temperature": 50}, response_format={
        "type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}})
    assert json.loads(structured.choices[0].message.content)["x"] in (1, 2)
    for name, base in (("ollama_chat/m", server.url), ("anthropic/m", server.url)):
        answer = litellm.completion(model=name, api_base=base, api_key="none", messages=ask("hi"), temperature=0,
                                    max_tokens=50)
        assert answer.choices[0].message.content == "Hello you, 日本 é!"
