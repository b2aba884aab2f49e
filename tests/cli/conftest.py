"""A micro model as a folder and as a GGUF file, made once; a cache of its own."""

import json

import pytest
from tests.cli.micro import write_micro

from hybridlm.cli import main
from hybridlm.formats.convert import convert


@pytest.fixture(scope="session")
def micro(tmp_path_factory):
    """A folder with a chat template."""
    return write_micro(tmp_path_factory.mktemp("micro") / "micro")


@pytest.fixture(scope="session")
def gguf(micro):
    convert(micro, micro.parent / "micro.gguf", "q8_0")
    return micro.parent / "micro.gguf"


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A GGUF file without a chat template."""
    folder = tmp_path_factory.mktemp("base")
    convert(write_micro(folder / "base", chat=""), folder / "base.gguf", "q8_0")
    return folder / "base.gguf"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HYBRIDLM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def cli(capsys):
    """`cli(*arguments)` -> (exit code, stdout, stderr); with `json=True` stdout read as its one object."""

    def run(*arguments, json_=False):
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return stop.value.code or 0, json.loads(out) if json_ else out, err

    return run
