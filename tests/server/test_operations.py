"""Health, metrics, several models under a memory budget, the OpenAPI document, the command's options."""

import re
import time
from pathlib import Path

import httpx
import pytest
from tests.server.scripted import scripted_engine, serving

from hybridlm.server.openapi import document
from hybridlm.server.settings import Settings


def test_metrics_are_what_prometheus_reads():
    with serving({"m": scripted_engine(lambda _: "yes")}) as s, httpx.Client(base_url=s.url, timeout=20) as http:
        assert http.get("/ready").json() == {"status": "ready"}
        for _ in range(3):
            http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "hi"}], "temperature": 0})
        answer = http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    names = set()
    for line in answer.text.splitlines():
        if line.startswith("#"):
            assert re.fullmatch(r"# (HELP \w+ .+|TYPE \w+ (counter|gauge|histogram))", line), line
            continue
        match = re.fullmatch(r'(\w+)(\{(\w+="[^"]*",?)+\})? (\d+(\.\d+)?(e-?\d+)?)', line)
        assert match, line
        names.add(match[1])
        if match[1] == "hybridlm_requests_finished_total":
            assert match[4] == "3"
    assert {"hybridlm_time_to_first_token_seconds_bucket", "hybridlm_cache_bytes",
            "hybridlm_prompt_tokens_reused_total", "hybridlm_http_responses_total"} <= names


def test_models_open_on_demand_and_close_for_memory_and_idleness():
    opened = []

    def opener(name):
        def open_engine():
            opened.append(name)
            engine = scripted_engine(lambda _: name, cache_bytes=0, model_bytes=100)
            return engine
        return open_engine

    settings = Settings(model_bytes=250, idle_seconds=1.2)
    with serving({name: opener(name) for name in "abc"}, settings) as s, \
            httpx.Client(base_url=s.url, timeout=20) as http:
        for m in s.app.state.models.all.values():
            m.nbytes = 100

        def ask(name):
            return http.post("/api/chat", json={"model": name, "stream": False, "options": {"temperature": 0},
                                                "messages": [{"role": "user", "content": "x"}]}).json()

        def open_now():
            return [m["model"] for m in http.get("/api/ps").json()["models"]]

        assert opened == ["a"]
        assert ask("b")["message"]["content"] == "b" and open_now() == ["a", "b"]
        ask("a")
        assert ask("c")["message"]["content"] == "c" and open_now() == ["a", "c"]  # b was used longest ago
        deadline = time.monotonic() + 10
        while open_now() != ["a"] and time.monotonic() < deadline:  # idle; the first one is never closed
            time.sleep(0.1)
        assert open_now() == ["a"] and opened == ["a", "b", "c"]
        http.post("/api/generate", json={"model": "b", "keep_alive": 0})
        deadline = time.monotonic() + 10
        while "b" in open_now() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert "b" not in open_now()
        assert http.post("/api/chat", json={"model": "b", "keep_alive": "x", "messages": []}).status_code == 400


def test_a_model_in_use_is_not_closed_for_another():
    settings = Settings(model_bytes=150)
    engines = {n: (lambda: scripted_engine(lambda _: "yes " * 300, cache_bytes=0, model_bytes=100)) for n in "ab"}
    with serving(engines, settings) as s, httpx.Client(base_url=s.url, timeout=20) as http:
        for m in s.app.state.models.all.values():
            m.nbytes = 100
        body = {"model": "a", "messages": [{"role": "user", "content": "x"}], "options": {"temperature": 0}}
        with http.stream("POST", "/api/chat", json=body) as stream:
            lines = stream.iter_lines()  # kept, or the connection would be closed
            next(lines)
            refused = http.post("/api/chat", json={**body, "model": "b", "stream": False})
            assert refused.status_code == 503 and "retry-after" in refused.headers


def test_the_document_describes_what_is_served():
    found = document()
    assert found["openapi"] == "3.1.0" and len(found["paths"]) >= 14
    text = str(found)
    for ref in set(re.findall(r"#/components/schemas/([\w.-]+)", text)):
        assert ref in found["components"]["schemas"]
    with serving({"m": scripted_engine()}) as s:
        assert httpx.get(s.url + "/openapi.json").json() == found


def fuzz(count):
    """schemathesis over the document; no answer may be a server's error."""
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings

    answers = {}
    with serving({"m": scripted_engine(lambda _: "yes")}, Settings(max_tokens=3, request_seconds=20)) as s:
        schema = schemathesis.openapi.from_url(s.url + "/openapi.json")
        operations = [o.ok() for o in schema.get_all_operations()]
        posts = [o for o in operations if o.method.upper() == "POST"]
        for operation in operations:
            share = count // (2 * len(posts)) if operation in posts else max(5, count // 400)
            for mode in schemathesis.GenerationMode:
                @given(case=operation.as_strategy(generation_mode=mode))
                @settings(max_examples=share, deadline=None, database=None, suppress_health_check=list(HealthCheck),
                          phases=[Phase.generate])
                def test(case):
                    answer = case.call(base_url=s.url)
                    assert answer.status_code < 500, (case.path, case.body, answer.text)
                    answers[answer.status_code] = answers.get(answer.status_code, 0) + 1

                try:
                    test()
                except Exception as error:
                    if type(error).__name__ not in ("Unsatisfiable", "SkipTest"):
                        raise
        assert httpx.get(s.url + "/health").status_code == 200
    return answers


def test_schemathesis_finds_no_server_error():
    answers = fuzz(160)
    assert sum(answers.values()) > 120 and {200, 400} <= set(answers), answers


@pytest.mark.soak
def test_schemathesis_finds_no_server_error_in_twenty_thousand_requests():
    answers = fuzz(21_000)
    print(answers)
    assert sum(answers.values()) >= 20_000, answers


def test_the_package_brings_its_page():
    folder = Path(__import__("hybridlm.server", fromlist=["x"]).__file__).parent / "page"
    assert {f.name for f in folder.iterdir()} == {"index.html", "app.js", "chats.js", "markdown.js", "style.css",
                                                  "icon.svg"}
    for file in folder.iterdir():
        assert not re.search(r"(?:src|href|url|import)\W{1,3}https?:", file.read_text().replace(
            "http://www.w3.org/2000/svg", "")), file


def test_help_explains_every_option(capsys, monkeypatch):
    from hybridlm.cli import main

    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    text = capsys.readouterr().out
    for option in ("--host", "--port", "--api-key", "--cors", "--allow-host", "--rate", "--max-body", "--max-tokens",
                   "--timeout", "--queue", "--parallel", "--state-memory", "--cache", "--keep-cache", "--cache-dir",
                   "--save-every", "--memory", "--idle", "--chat-template", "--device", "--threads", "--context",
                   "--kv-type", "--grace", "--log"):
        assert option in text


@pytest.mark.parametrize("arguments,words", [
    (["--cache", "many"], "no size"), (["--log", "xml"], "text or json"), (["nothing.gguf"], "no such file"),
    (["--chat-template", "nothing.jinja"], "cannot be read"), ([], "no model to serve")])
def test_wrong_arguments_end_in_one_line(arguments, words, capsys, monkeypatch, tmp_path):
    from hybridlm.cli import main

    monkeypatch.setenv("HYBRIDLM_HOME", str(tmp_path))
    with pytest.raises(SystemExit) as stop:
        main(["serve", *arguments])
    err = capsys.readouterr().err
    assert stop.value.code and words in err and "Traceback" not in err


def test_a_damaged_model_ends_in_one_line(capsys, monkeypatch, tmp_path):
    from hybridlm.cli import main

    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(SystemExit) as stop:
        main(["serve", str(tmp_path / "bad.gguf"), "--port", "0"])
    err = capsys.readouterr().err
    assert stop.value.code == 1 and "error: " in err and "bad.gguf" in err and "Traceback" not in err
