"""The prefix cache in service: what is reused over turns and edits, over a restart, and that it changes nothing."""

import json
import os
import signal
import subprocess
import sys
import time

import httpx
import numpy as np
import pytest
from tests.cli.micro import write_micro
from tests.server.scripted import scripted_engine, serving

from hybridlm.engine import Engine
from hybridlm.engine.sampler import log_softmax
from hybridlm.formats.convert import convert


def chat(http, messages, **more):
    answer = http.post("/v1/chat/completions", json={"messages": messages, "temperature": 0, **more}).json()
    return answer["choices"][0]["message"]["content"], answer["usage"]


def test_turns_reuse_nearly_all_and_edits_resume_from_the_nearest_checkpoint():
    words = "the quick cat sat on the mat and the other cat did not "
    engine = scripted_engine(lambda h: f"Well {len(h)}, " + words, checkpoint_every=64)
    with serving({"m": engine}) as s, httpx.Client(base_url=s.url, timeout=30) as http:
        messages, known, reusable, reused = [{"role": "system", "content": words * 2}], 0, 0, 0
        seen = []
        for turn in range(8):
            messages.append({"role": "user", "content": f"turn {turn}: {words}"})
            text, usage = chat(http, messages)
            reusable += known
            reused += usage["prompt_tokens_details"]["cached_tokens"]
            known = usage["total_tokens"]  # the next prompt begins with all of it
            seen.append(usage["prompt_tokens"])
            messages.append({"role": "assistant", "content": text})
        assert reused / reusable >= 0.95, reused / reusable
        for turn in (6, 3, 1):
            edited = [*messages[:1 + 2 * turn], {"role": "user", "content": "edited"}]
            text, usage = chat(http, edited)
            before = seen[turn - 1]  # the turn before ended behind this prompt
            cached = usage["prompt_tokens_details"]["cached_tokens"]
            assert before <= cached <= usage["prompt_tokens"]
        metrics = http.get("/metrics").text
        total = int(next(line.split()[-1] for line in metrics.splitlines() if "prompt_tokens_reused_total{" in line))
        assert total >= reused


def test_thoughts_left_out_of_the_history_cost_only_the_answer():
    from tests.server.scripted import THINKING

    engine = scripted_engine(lambda _: "I think a lot about it\n</think>\n\nYes.", THINKING, checkpoint_every=10_000)
    with serving({"m": engine}) as s, httpx.Client(base_url=s.url, timeout=30) as http:
        messages = [{"role": "user", "content": "the cat sat on the mat " * 10}]
        text, first = chat(http, messages)
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "and?"}]
        _, second = chat(http, messages)
        opening = 20  # tokens at most
        assert second["prompt_tokens_details"]["cached_tokens"] >= first["prompt_tokens"] - opening


@pytest.mark.parametrize("type,limit", [("f32", 1e-5), ("q8_0", 1e-3)])
def test_a_cached_run_differs_from_a_cold_one_by_rounding_only(tmp_path, type, limit):
    """Mean KL over next-token distributions, of states that were resumed at odd places against one whole pass."""
    convert(write_micro(tmp_path / "m"), tmp_path / "m.gguf", type)
    rng, kl = np.random.default_rng(0), []
    with Engine.open(tmp_path / "m.gguf", checkpoint_every=64, kv_type="f32" if type == "f32" else "f16") as engine:
        for _ in range(12):
            prompt = rng.integers(0, 400, int(rng.integers(60, 300))).tolist()
            list(engine.generate(prompt[:int(rng.integers(20, len(prompt)))], max_tokens=2, ignore_eos=True))
            cut = int(rng.integers(10, len(prompt)))
            list(engine.generate(prompt, max_tokens=1, checkpoints=(cut,), ignore_eos=True))
            session, reused = engine.resume(prompt[:-1])
            assert reused > 0
            for token in prompt[reused:]:
                session.feed([token])
            warm, cold = log_softmax(session.logits()), log_softmax(engine.logits(prompt)[-1])
            kl.append(float((np.exp(cold) * (cold - warm)).sum()))
    assert np.mean(kl) < limit, np.mean(kl)


def start(model, folder, *more):
    process = subprocess.Popen(
        [sys.executable, "-m", "hybridlm.cli", "serve", f"m={model}", "--port", "0", "--cache-dir", str(folder),
         "--chat-template", "chatml", "--save-every", "1", "--threads", "1", "--cache", "50MB", *more],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "HYBRIDLM_HOME": str(folder / "home")})
    line = process.stderr.readline()
    url = line.split(" at ")[1].split()[0]
    for _ in range(400):
        try:
            if httpx.get(url + "/ready").status_code == 200:
                return process, url
        except httpx.ConnectError:
            pass
        time.sleep(0.02)
    raise AssertionError(line)


def finished(process):
    code = process.wait(timeout=20)
    process.stderr.close()
    return code


def test_killed_and_restarted_the_disk_cache_is_valid_or_ignored(tmp_path):
    convert(write_micro(tmp_path / "m", max_position_embeddings=2048), tmp_path / "m.gguf", "q8_0")
    prompt = {"prompt": "the cat sat on the mat " * 40, "max_tokens": 12, "temperature": 0}
    process, url = start(tmp_path / "m.gguf", tmp_path / "cache")
    cold = httpx.post(url + "/v1/completions", json=prompt, timeout=30).json()
    assert cold["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    for _ in range(300):
        if list((tmp_path / "cache").glob("*/*/*.state")):
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    finished(process)

    process, url = start(tmp_path / "m.gguf", tmp_path / "cache")
    warm = httpx.post(url + "/v1/completions", json=prompt, timeout=30).json()
    assert warm["usage"]["prompt_tokens_details"]["cached_tokens"] > 100
    assert warm["choices"][0]["text"] == cold["choices"][0]["text"]
    process.send_signal(signal.SIGTERM)  # saves at the end
    assert finished(process) in (0, -signal.SIGTERM)

    for n, file in enumerate(sorted((tmp_path / "cache").glob("*/*/*.*"))):  # damaged, and cut off as by a crash
        data = bytearray(file.read_bytes())
        data[len(data) // 2:len(data) // 2 + 1000] = os.urandom(1000)
        file.write_bytes(data[:len(data) - 100 * (n % 2)])
    process, url = start(tmp_path / "m.gguf", tmp_path / "cache")
    again = httpx.post(url + "/v1/completions", json=prompt, timeout=30).json()
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert again["choices"][0]["text"] == cold["choices"][0]["text"]
    process.send_signal(signal.SIGKILL)
    finished(process)
    if os.name == "posix":  # what was said is nobody else's
        assert all(p.stat().st_mode & 0o077 == 0 for p in (tmp_path / "cache").glob("*/**/*") if p.name != "lock")


def test_the_log_is_json_and_tells_no_content(tmp_path):
    convert(write_micro(tmp_path / "m"), tmp_path / "m.gguf", "q8_0")
    process, url = start(tmp_path / "m.gguf", tmp_path / "cache", "--log", "json")
    httpx.post(url + "/v1/completions", json={"prompt": "a secret word", "max_tokens": 3}, timeout=30)
    httpx.get(url + "/nowhere")
    process.send_signal(signal.SIGTERM)
    lines = process.stderr.read().splitlines()
    finished(process)
    records = [json.loads(line) for line in lines if line.startswith("{")]
    request = next(r for r in records if r.get("path") == "/v1/completions")
    assert request["status"] == 200 and request["tokens"] == 3 and request["cached_tokens"] == 0
    assert any(r.get("status") == 404 for r in records) and "secret" not in "".join(lines)
