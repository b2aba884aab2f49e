"""The terminal conversation: turns, commands, the terminal itself, a model that cannot chat."""

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest
from tests.cli.micro import write_micro

from hybridlm.cli.chat import Talk, Text, turn_end
from hybridlm.engine import Engine
from hybridlm.formats.convert import convert


@pytest.fixture
def talk(cli, monkeypatch):
    """`talk(model, *lines)` with stdin as a pipe -> (stdout, stderr)."""

    def run(model, *lines, options=()):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        code, out, err = cli("chat", model, "-n", 12, "--seed", 1, *options)
        assert code == 0
        return out, err

    return run


def saved(path):
    return json.loads(path.read_text())["messages"]


def test_turns_are_rendered_with_all_before_them(talk, gguf, tmp_path):
    out, err = talk(gguf, "one", "two", f"/save {tmp_path / 'x.json'}", "/stats", options=["--system", "be brief"])
    messages = saved(tmp_path / "x.json")
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert out == "".join(m["content"] + "\n" for m in messages if m["role"] == "assistant")
    with Engine.open(gguf) as engine:
        first = engine.chat(messages[:2], max_tokens=12, seed=1, temperature=0.7, top_p=0.95, stop="<|im_end|>")
        assert "".join(p.text for p in first) == messages[2]["content"]
        # The second answer is not compared: with 8-bit activations a cached prompt rounds differently from a cold one.
        assert f"[prompt {engine.chat(messages[:-1]).prompt_tokens} tokens" in err


def test_later_turns_reuse_what_was_read(gguf):
    with Engine.open(gguf) as engine:
        conversation = Talk(engine, {"max_tokens": 12, "temperature": 0, "seed": 0})
        conversation.say("the cat sat on the mat " * 5)
        first = conversation.generate()
        conversation.answered("".join(p.text for p in first))
        conversation.say("again")
        second = conversation.generate()
        list(second)
        assert second.reused_tokens >= first.prompt_tokens - 16  # the engine keeps none nearer than that to another


def test_commands(talk, gguf, tmp_path):
    file = tmp_path / "x.json"
    out, err = talk(gguf, "/regenerate", "/stats", "one", "/regenerate", f"/save {file}", "/reset", "/system be kind",
                    "two", f"/load {file}", f"/save {file}", "/system", "/nope", "/load absent", "/save", "/help",
                    "/exit", "never")
    assert err.count("nothing has been answered yet") == 2 and "[forgotten]" in err and "[system: be kind]" in err
    assert "/nope is not a command" in err and "absent: cannot be read" in err and "/save: give a file" in err
    assert "/regenerate " in err and "never" not in json.dumps(saved(file))
    assert [m["role"] for m in saved(file)] == ["user", "assistant"]
    assert out.count("\n") >= 3


def test_a_damaged_file_changes_nothing(talk, gguf, tmp_path):
    (tmp_path / "bad.json").write_text('{"messages": [{"role": "root", "content": "x"}]}')
    err = talk(gguf, f"/load {tmp_path / 'bad.json'}", "one")[1]
    assert "not a conversation" in err


def test_long_messages_on_several_lines(talk, gguf, tmp_path):
    talk(gguf, "one \\", "two", '"""', "three", "", "four", '"""', f"/save {tmp_path / 'x.json'}")
    assert [m["content"] for m in saved(tmp_path / "x.json") if m["role"] == "user"] == ["one \ntwo", "three\n\nfour"]


def test_a_full_context_is_an_error_and_not_the_end(talk, gguf, tmp_path):
    err = talk(gguf, "the cat " * 600, "short", f"/save {tmp_path / 'x.json'}")[1]
    assert "error: context" in err and saved(tmp_path / "x.json")[0]["content"] == "short"


def test_a_model_without_template_continues_text(talk, base, tmp_path):
    out, err = talk(base, "the cat", "", "and", f"/save {tmp_path / 'x.json'}", "/system x", "/regenerate", "/stats")
    text = json.loads((tmp_path / "x.json").read_text())["text"]
    assert "no chat template" in err and "continues text" in err and "knows no system message" in err
    assert text.startswith("the cat") and "\nand" in text and "tokens generated" in err
    with Engine.open(base) as engine:
        assert isinstance(Text(engine, {}), Talk) and engine.chat_template is None
    assert out.startswith(text.removeprefix("the cat")[:3])


def test_turn_end(gguf):
    with Engine.open(gguf) as engine:
        assert turn_end(engine) == "<|im_end|>"


def test_ctrl_c_stops_the_answer_only(tmp_path):
    """In a real terminal: interrupt an endless answer, then ask again, leave by Ctrl-D; the history is kept."""
    # Endless: nothing that it could write by chance ends an answer.
    folder = write_micro(tmp_path / "long", max_position_embeddings=60_000, eos_token_id=100_000,
                         chat="{% for m in messages %}{{ m.content }}\n{% endfor %}")
    convert(folder, tmp_path / "long.gguf", "q8_0")
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "hybridlm.cli", "chat", str(tmp_path / "long.gguf"), "--seed", "1"]
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
                               preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
                               env={**os.environ, "TERM": "dumb"})
    os.close(slave)
    seen = b""  # and not yet asked for

    def until(word: bytes = b"", more: int = 0) -> None:
        nonlocal seen
        deadline = time.monotonic() + 60
        while word not in seen or len(seen) < more:
            assert time.monotonic() < deadline, seen
            if select.select([master], [], [], 1)[0]:
                seen += os.read(master, 4096)
        seen = seen[max(more, seen.find(word) + len(word)):]

    try:
        until(b"> ")
        os.write(master, b"hello\n")
        until(b"hello")
        until(more=200)
        os.write(master, b"\x03")
        until(b"[stopped]")
        until(b"> ")
        os.write(master, b"/stats\n")
        until(b"tokens generated")
        until(b"> ")
        os.write(master, b"\x03")
        if not select.select([master], [], [], 5)[0]:  # came before readline listened; Python notices at Enter
            os.write(master, b"\n")
        until(b"[Ctrl-D or /exit leaves]")
        until(b"> ")
        os.write(master, b"\x04")
        assert process.wait(30) == 0
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        os.close(master)
    assert "hello" in (tmp_path / "home" / "chat_history").read_text()
