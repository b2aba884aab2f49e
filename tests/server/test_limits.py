"""What must not come through, and what is said to it: sizes, shapes, rates, keys, origins, slow and absent clients."""

import asyncio
import contextlib
import json
import random
import socket
import time

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.server.scripted import scripted_engine, serving

from hybridlm.server.settings import Settings

POSTS = ("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/messages/count_tokens", "/api/chat",
         "/api/generate", "/api/show")
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}


@pytest.fixture(scope="module")
def server():
    with serving({"m": scripted_engine(lambda _: "yes " * 300)},
                 Settings(body_bytes=100_000, body_seconds=0.5, request_seconds=30)) as s:
        yield s


@pytest.fixture
def http(server):
    with httpx.Client(base_url=server.url, timeout=20) as client:
        yield client


def message(path, answer):
    """The message of an error, in the form of its API."""
    body = answer.json()
    if path.startswith("/v1/messages"):
        assert body["type"] == "error" and body["request_id"] and body["error"]["type"]
        return body["error"]["message"]
    return body["error"] if path.startswith("/api/") else body["error"]["message"]


BROKEN = {
    "not JSON": b"{", "nothing": b"", "a list": b"[1]", "a number": b"3", "invalid UTF-8": b'{"model": "\xff\xfe"}',
    "half a character": b'{"model": "\\ud83d", "prompt": "\\ud83d"}', "NaN": b'{"temperature": NaN}',
    "infinity": b'{"temperature": -Infinity}', "deep": b'{"a":' * 5000 + b"1" + b"}" * 5000,
    "deeper": b"[" * 60_000, "half deep": b'{"messages":' + b"[" * 300 + b"]" * 300 + b"}",
    "a huge number": b'{"seed": ' + b"9" * 10_000 + b"}", "a huge exponent": b'{"max_tokens": 1e400, "model": "m"}',
    "NUL": b"\x00", "wrong types": b'{"model": 7, "messages": "x", "prompt": {"a": 1}}',
}


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("name", BROKEN)
def test_broken_bodies_get_a_clear_400(http, path, name):
    answer = http.post(path, content=BROKEN[name])
    assert answer.status_code in (400, 404), answer.text  # an unknown model may be found out first
    assert answer.headers["content-type"] == "application/json" and len(message(path, answer)) > 5
    assert answer.headers["x-request-id"].startswith("req_")


WRONG = [({"messages": []}, "messages"), ({"messages": [{"role": "king", "content": "x"}]}, "role"),
         ({**CHAT, "temperature": -1}, "temperature"), ({**CHAT, "top_p": 0}, "top_p"),
         ({**CHAT, "max_tokens": -1}, "max_tokens"), ({**CHAT, "n": 0}, "n"), ({**CHAT, "stop": [""]}, "stop"),
         ({**CHAT, "stop": ["x"] * 17}, "stop"), ({**CHAT, "top_logprobs": 21, "logprobs": True}, "top_logprobs"),
         ({**CHAT, "logit_bias": {"x": 1}}, "logit_bias"), ({**CHAT, "logit_bias": {"-3": 1}}, "logit_bias"),
         ({**CHAT, "tools": [{"type": "function", "function": {"name": "a b"}}]}, "name"),
         ({**CHAT, "tool_choice": "required"}, "tool_choice"),
         ({**CHAT, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
         ({**CHAT, "response_format": {"type": "regex"}}, "regex"), ({**CHAT, "guided_regex": "("}, "regex"),
         ({**CHAT, "guided_grammar": "start: x"}, "lark"), ({**CHAT, "guided_choice": []}, "choice"),
         ({**CHAT, "guided_json": {"$ref": "file:///etc/passwd"}}, "json_schema"),
         ({**CHAT, "chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
         ({"messages": [{"role": "user", "content": "x" * 20_000}]}, "context"),
         ({"messages": [{"role": "assistant", "content": "", "tool_calls": [
             {"function": {"name": "f", "arguments": "[1]"}}]}]}, "arguments")]


@pytest.mark.parametrize("body,words", WRONG, ids=[str(i) for i in range(len(WRONG))])
@pytest.mark.parametrize("stream", [False, True])
def test_wrong_fields_are_named_before_anything_streams(http, body, words, stream):
    answer = http.post("/v1/chat/completions", json={**body, "stream": stream})
    assert answer.status_code == 400 and words in message("/v1", answer), answer.text


def test_no_file_is_reached_by_a_name(http, tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"x")
    for name in (str(tmp_path / "m.gguf"), "../../m", "/etc/passwd", "file:///etc/passwd", "owner/name"):
        assert http.post("/api/show", json={"model": name}).status_code == 404
        assert http.post("/v1/chat/completions", json={**CHAT, "model": name}).status_code == 404
    for path in ("/page/../app.py", "/page/%2e%2e/app.py", "/page/..%2fapp.py", "/page/app.py", "/page/"):
        assert http.get(path).status_code == 404


def test_other_paths_and_methods(http):
    for path in ("/v1/embeddings", "/v2", "/api/pull"):
        answer = http.post(path, json={})
        assert answer.status_code == 404 and "openapi.json" in message(path, answer)
    for path in POSTS:
        assert http.get(path).status_code == 405
    assert http.request("DELETE", "/v1/models").status_code == 405
    assert http.head("/").status_code == 200  # what Ollama's clients ask first


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_fuzzed_fields_never_break_the_server(server, data):
    """Known fields with any JSON in them."""
    value = st.recursive(st.none() | st.booleans() | st.integers(-2**70, 2**70) | st.floats(
        allow_nan=False, allow_infinity=False)
                         | st.text(max_size=8), lambda c: st.lists(c, max_size=3)
                         | st.dictionaries(st.text(max_size=5), c, max_size=3), max_leaves=6)
    path = data.draw(st.sampled_from(POSTS))
    names = ["messages", "prompt", "tools", "tool_choice", "stop", "options", "format", "seed", "temperature", "top_k",
             "n", "system", "response_format", "logprobs", "logit_bias", "keep_alive", "stop_sequences", "guided_json",
             "guided_regex", "stream_options", "think", "chat_template_kwargs", "echo"]
    body = {"model": "m", "max_tokens": 2, "options": {"num_predict": 2}, "messages": CHAT["messages"], "prompt": "hi"}
    for name in data.draw(st.lists(st.sampled_from(names), max_size=3, unique=True)):
        body[name] = data.draw(value)
    if isinstance(body.get("prompt"), str | list) and not body["prompt"]:
        body["prompt"] = "x"
    if isinstance(body["options"], dict):
        body["options"]["num_predict"] = 2
    with httpx.Client(base_url=server.url, timeout=20) as client:
        answer = client.post(path, json=body)
    assert answer.status_code < 500, (path, body, answer.text)


def test_bodies_are_bounded(http, server):
    answer = http.post("/v1/chat/completions", content=b"x" * 100_001)
    assert answer.status_code == 413 and "100000" in message("/v1", answer)

    def endless():
        for _ in range(10_000):
            yield b"y" * 1000

    with contextlib.suppress(httpx.WriteError, httpx.ReadError):
        assert http.post("/api/chat", content=endless()).status_code == 413


def test_a_slow_body_is_given_up(server):
    with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])), timeout=10) as s:
        s.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 50\r\n\r\n{")
        began = time.monotonic()
        answer = s.recv(4096)
        assert b" 408 " in answer.split(b"\r\n")[0] and time.monotonic() - began < 5


def test_garbage_on_the_socket(server):
    rng = random.Random(0)
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])), timeout=5) as s:
            s.sendall(rng.randbytes(200) + b"\r\n\r\n")
            with contextlib.suppress(OSError):
                assert b" 400 " in s.recv(4096).split(b"\r\n")[0]
    assert httpx.get(server.url + "/health").json() == {"status": "ok"}


def test_a_client_that_goes_away_is_not_written_for(server, http):
    counters = server.loaded().scheduler.counters
    for path, body in (("/v1/chat/completions", {**CHAT, "max_tokens": 1500, "stream": True, "temperature": 0}),
                       ("/v1/chat/completions", {**CHAT, "max_tokens": 1500, "temperature": 0}),
                       ("/api/chat", {"model": "m", "messages": CHAT["messages"], "options": {"temperature": 0}})):
        before = counters.cancelled

        async def leave(path=path, body=body):
            async with httpx.AsyncClient(base_url=server.url) as client:
                task = asyncio.create_task(client.post(path, json=body))
                await asyncio.sleep(0.15)
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task

        asyncio.run(leave())
        deadline = time.monotonic() + 5
        while counters.cancelled == before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert counters.cancelled == before + 1, path
    assert server.loaded().scheduler.active == 0


def test_keys():
    with serving({"m": scripted_engine()}, Settings(api_keys=("one", "two"))) as s, \
            httpx.Client(base_url=s.url) as http:
        for headers in ({}, {"authorization": "Bearer three"}, {"x-api-key": "onee"}, {"authorization": "one"}):
            answer = http.get("/v1/models", headers=headers)
            assert answer.status_code == 401 and "api key" in message("/v1", answer)
        for headers in ({"authorization": "Bearer one"}, {"x-api-key": "two"}):
            assert http.get("/v1/models", headers=headers).status_code == 200
        assert http.get("/metrics").status_code == 401
        assert http.get("/health").status_code == http.get("/").status_code == http.get("/ready").status_code == 200


def test_origins_and_hosts():
    with serving({"m": scripted_engine()}, Settings(cors=("https://good.example",), hosts=("proxy.lan",))) as s, \
            httpx.Client(base_url=s.url) as http:
        bad = http.post("/v1/completions", json={"prompt": "x"}, headers={"origin": "https://evil.example"})
        assert bad.status_code == 403 and "access-control-allow-origin" not in bad.headers
        good = http.get("/v1/models", headers={"origin": "https://good.example"})
        assert good.headers["access-control-allow-origin"] == "https://good.example"
        asked = http.options("/v1/models", headers={"origin": "https://good.example",
                                                    "access-control-request-method": "POST"})
        assert asked.status_code == 204 and "POST" in asked.headers["access-control-allow-methods"]
        assert http.options("/v1/models", headers={"origin": "https://evil.example"}).status_code == 403
        assert http.get("/v1/models", headers={"origin": s.url}).status_code == 200  # its own page
        rebound = http.get("/v1/models", headers={"host": "evil.example"})
        assert rebound.status_code == 403 and "loopback" in message("/v1", rebound)
        assert http.get("/v1/models", headers={"host": "proxy.lan"}).status_code == 200


def test_rates():
    with serving({"m": scripted_engine()}, Settings(rate=5)) as s, httpx.Client(base_url=s.url) as http:
        codes = [http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code for _ in range(8)]
        assert codes == [200] * 5 + [429] * 3
        answer = http.post("/v1/completions", json={"prompt": "x"})
        assert 1 <= int(answer.headers["retry-after"]) <= 13 and "5 requests a minute" in message("/v1", answer)
        assert http.get("/health").status_code == 200


def test_a_full_queue_says_when_to_come_again():
    engine = scripted_engine(lambda _: "yes " * 400)
    with serving({"m": engine}, Settings(running=1, waiting=2)) as s:
        async def flood():
            async with httpx.AsyncClient(base_url=s.url, timeout=60) as client:
                return await asyncio.gather(*(client.post("/v1/chat/completions", json={
                    **CHAT, "max_tokens": 30, "temperature": 0}) for _ in range(12)))

        answers = asyncio.run(flood())
        codes = sorted(a.status_code for a in answers)
        assert set(codes) == {200, 429} and codes.count(200) >= 2  # a third where one had begun before the rest came
        full = next(a for a in answers if a.status_code == 429)
        assert int(full.headers["retry-after"]) >= 1 and "waiting already" in message("/v1", full)


def test_time_and_token_limits():
    engine = scripted_engine(lambda _: "yes " * 400)
    with serving({"m": engine}, Settings(max_tokens=50)) as s, httpx.Client(base_url=s.url, timeout=30) as http:
        answer = http.post("/v1/chat/completions", json={**CHAT, "max_tokens": 1000, "temperature": 0}).json()
        assert answer["usage"]["completion_tokens"] == 50 and answer["choices"][0]["finish_reason"] == "length"
    with serving({"m": scripted_engine(lambda _: "yes " * 400)}, Settings(request_seconds=0.3)) as s, \
            httpx.Client(base_url=s.url, timeout=30) as http:
        began = time.monotonic()
        answer = http.post("/v1/chat/completions", json={**CHAT, "max_tokens": 1900, "temperature": 0}).json()
        assert answer["choices"][0]["finish_reason"] == "length" and time.monotonic() - began < 5
        assert 0 < answer["usage"]["completion_tokens"] < 1900


def test_the_end_fails_what_runs_and_says_so():
    engine = scripted_engine(lambda _: "yes " * 400)
    with serving({"m": engine}) as s, httpx.Client(base_url=s.url, timeout=30) as http, http.stream(
            "POST", "/v1/chat/completions", json={**CHAT, "max_tokens": 1900, "stream": True,
                                                  "temperature": 0}) as answer:
        lines = answer.iter_lines()
        next(lines)
        s.server.should_exit = True
        s.app.state.models.all["m"].loaded.scheduler.close()
        text = "\n".join(lines)
    assert json.loads(text.split("data: ")[-2 if text.rstrip().endswith("[DONE]") else -1])["error"]["message"]
