"""What the README shows is what works: its commands parse, its Python runs."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from hybridlm.cli import build_app

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    (hybridlm .*)$", README, re.MULTILINE)


def test_there_is_something_to_test():
    assert len(COMMANDS) > 10


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_parse(line, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    _, name, *arguments = shlex.split(line, comments=True)
    if name == "--help":
        return
    command = typer.main.get_command(build_app(name)).commands[name]
    if hasattr(command, "commands"):
        command, arguments = command.commands[arguments[0]], arguments[1:]
    command.make_context(name, arguments)  # raises for an option or argument that does not exist
    with pytest.raises(Exception, match="frobnicate"):
        command.make_context(name, [*arguments, "--frobnicate"])


def test_python_runs(monkeypatch, tmp_path, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    model = ROOT / "models" / "hybridlm-tiny-q8_0.gguf"
    if not model.is_file():
        pytest.skip("no model in models/")
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace("models/hybridlm-tiny-q8_0.gguf", str(model)), "README.md", "exec"), {})
    assert len(capsys.readouterr().out) > 50 and (tmp_path / "river.state").is_file()


@pytest.mark.parametrize("target", re.findall(r"\]\(((?!http)[^)#]+)", README))
def test_links_lead_somewhere(target):
    assert (ROOT / target).exists()
