"""Commands that open a MODEL by its hub name, and how long work is shown."""

import io
import json

import pytest

from hybridlm.cli import main
from hybridlm.cli._progress import Stages
from hybridlm.errors import ModelNotFoundError
from hybridlm.formats.convert import convert
from hybridlm.store import weights


@pytest.fixture
def cli(capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in arguments])
        return stop.value.code or 0, *capsys.readouterr()

    return run


def test_generate_by_name_and_then_without_the_hub(hub, cli, monkeypatch):
    code, out, err = cli("generate", "someone/micro:q4_0", "the cat", "-n", 3, "--json")
    assert code == 0 and json.loads(out)["generated_tokens"] <= 3
    assert err.splitlines() == ["looking up someone/micro", "downloading", "converting to q4_0"]
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert cli("generate", "someone/micro:q4_0", "the cat", "-n", 3)[0] == 0
    code, out, err = cli("generate", "someone/micro:q8_0", "the cat", "-n", 3)
    assert code == 1 and not out and "cannot be reached" in err.splitlines()[-1]
    assert cli("inspect", "someone/nothing")[0] == 1


def test_convert_by_name(hub, cli, tmp_path):
    served = hub.root / "someone" / "micro"
    assert cli("convert", "someone/micro", tmp_path / "x.gguf", "--type", "f16")[0] == 0
    convert(served, tmp_path / "y.gguf", "f16", name="micro")
    assert (tmp_path / "x.gguf").read_bytes() == (tmp_path / "y.gguf").read_bytes()
    assert "no branch, tag or commit" in cli("convert", "someone/micro@v9", tmp_path / "z.gguf")[2]
    assert not (tmp_path / "z.gguf").exists()


def test_the_folder_behind_a_name(hub):
    served = hub.root / "someone" / "micro"
    folder = weights("someone/micro")
    assert {f.name for f in folder.iterdir()} == {f.name for f in served.iterdir()}
    hub.sent = 0
    assert weights("someone/micro") == folder and hub.sent == 0
    assert weights(served) == served
    with pytest.raises(ModelNotFoundError, match="no such file"):
        weights("absent.gguf")


class Screen(io.StringIO):
    def isatty(self):
        return True


def test_stages_in_a_terminal_and_elsewhere(monkeypatch, capsys):
    with Stages() as stages:
        for done in (0, 50, 100):
            stages("downloading", done, 100)
        stages("kept [17 GB]", 0, 0)
        stages.status("nothing to see")
    assert capsys.readouterr().err == "downloading\nkept [17 GB]\n"
    screen = Screen()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("COLUMNS", "100")
    with Stages() as stages:
        stages("kept [17 GB]", 0, 0)
        stages("downloading", 50_000_000, 100_000_000)
        stages("downloading", 100_000_000, 100_000_000)
    assert "kept [17 GB]" in screen.getvalue() and "100.0/100.0 MB" in screen.getvalue()
