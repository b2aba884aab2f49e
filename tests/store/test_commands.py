"""pull, list, rm, aliases and upload, against the stand-in hub."""

import json

import pytest
from tests.cli.micro import write_micro

from hybridlm.cli import main
from hybridlm.errors import HybridLMError
from hybridlm.formats.convert import convert
from hybridlm.store import home, resolve
from hybridlm.store.catalogue import aliases, entries, set_alias
from hybridlm.store.upload import card, read


@pytest.fixture
def cli(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in err, err
        return stop.value.code or 0, out, err

    return run


def test_pull_list_rm(cli, hub):
    code, out, err = cli("list")
    assert code == 0 and not out and "hybridlm pull" in err
    code, out, err = cli("pull", "someone/micro", "--as", "mine")
    assert code == 0 and out.strip() == str(resolve("someone/micro")) and "mine is ready" in err
    cli("pull", "someone/micro:f16")
    cli("pull", "someone/micro", "--type", "q4_0", "--as", "small")
    assert resolve("small").name.endswith(".gguf") and "q4_0" in resolve("small").name
    code, out, _ = cli("list")
    assert [line.split()[0] for line in out.splitlines()] == [
        "NAME", "someone/micro:f16", "someone/micro", "someone/micro:q4_0", "mine", "small"]
    listed = json.loads(cli("list", "--json")[1])
    assert {m["name"] for m in listed["models"]} == {e.name for e in entries()} and listed["aliases"] == aliases()

    before = len(hub.requests)
    assert resolve("mine") == resolve("someone/micro") and len(hub.requests) == before  # nothing is asked again
    code, _, err = cli("rm", "someone/micro:f16")
    assert code == 0 and "kB are free" in err
    assert {e.name for e in entries()} == {"someone/micro", "someone/micro:q4_0"}
    cli("rm", "small")
    assert set(aliases()) == {"mine"} and {e.name for e in entries()} == {"someone/micro", "someone/micro:q4_0"}
    cli("rm", "someone/micro")
    assert not entries() and not (home() / "hub" / "someone--micro").exists()


@pytest.mark.parametrize("name", ["nobody/nothing", "../../etc", "x", "someone/micro:q9", "/etc/passwd", "..", "a/.."])
def test_rm_deletes_nothing_else(cli, hub, name, tmp_path):
    cli("pull", "someone/micro")
    outside = tmp_path / "outside"
    outside.write_text("x")
    code, _, err = cli("rm", name)
    assert code == 1 and "not in the store" in err
    assert len(entries()) == 1 and outside.exists()


def test_two_names_of_one_file(cli, hub):
    cli("pull", "someone/micro")
    commit = hub.commit("someone/micro")
    cli("pull", f"someone/micro@{commit}")
    a, b = entries()
    assert a.path == b.path
    cli("rm", f"someone/micro@{commit}")
    assert [e.name for e in entries()] == ["someone/micro"] and entries()[0].path.is_file()


def test_aliases(tmp_path):
    convert(write_micro(tmp_path / "m"), tmp_path / "m.gguf", "q8_0")
    set_alias("m7", str(tmp_path / "m.gguf"))
    assert resolve("m7") == tmp_path / "m.gguf"
    for bad in ("", "a/b", "../x", "a b", "x" * 70, "-x"):
        with pytest.raises(HybridLMError, match="alias"):
            set_alias(bad, "x")
    (home() / "aliases.json").write_text("[broken")
    assert aliases() == {}


def test_upload_and_pull_back(cli, hub, tmp_path):
    folder = write_micro(tmp_path / "m")
    files = [tmp_path / f"Micro-{t}.gguf" for t in ("q8_0", "f16")]
    for file in files:
        convert(folder, file, file.stem.split("-")[1])
    code, out, err = cli("upload", *files, "me/Micro-GGUF", "--license", "apache-2.0", "--base-model", "someone/micro")
    assert code == 0, err
    assert out.strip() == f"{hub.url}/me/Micro-GGUF" and "hybridlm pull me/Micro-GGUF" in err
    there = hub.files("me/Micro-GGUF")
    assert set(there) == {"Micro-q8_0.gguf", "Micro-f16.gguf", "README.md"}
    assert there["Micro-q8_0.gguf"].read_bytes() == files[0].read_bytes()
    text = there["README.md"].read_text()
    assert text.startswith("---\nlicense: apache-2.0\nbase_model: someone/micro\n") and "hybridlm chat me/Mi" in text
    assert read(files[0], lambda *_: None).sha256 in text
    assert resolve("me/Micro-GGUF:f16").read_bytes() == files[1].read_bytes()

    there["README.md"].write_text("my own words")
    code, _, _ = cli("upload", files[0], "me/Micro-GGUF")  # again: nothing large is sent, the card stays
    assert code == 0 and there["README.md"].read_text() == "my own words"
    assert sum(m == "PUT" for m, _, _ in hub.requests) == 2


def test_upload_says_what_is_wrong(cli, hub, tmp_path):
    convert(write_micro(tmp_path / "m", chat=""), tmp_path / "m.gguf", "q8_0")
    (tmp_path / "x.gguf").write_bytes(b"no model")
    (tmp_path / "x.bin").write_bytes(b"no model")
    for arguments, words in ((["x.bin", "me/x"], "not a .gguf"), (["x.gguf", "me/x"], "x.gguf"),
                             (["m.gguf", "nonsense"], "OWNER/NAME"),
                             (["m.gguf", "me/x", "--license", "a\nb: c"], "license"),
                             (["m.gguf", "me/x", "--card", "none.md"], "cannot be read")):
        code, _, err = cli("upload", *[tmp_path / a if "." in a and "/" not in a and "\n" not in a else a
                                       for a in arguments])
        assert code == 1 and words in err, err
    code, out, _ = cli("upload", tmp_path / "m.gguf", "me/x", "--dry-run")
    assert code == 0 and "no chat template" in out and not (hub.root / "me").exists()
    hub.faults.status = 500
    code, _, err = cli("upload", tmp_path / "m.gguf", "me/x")
    assert code == 1 and "500" in err
    hub.faults.status, hub.token = None, "secret"
    code, _, err = cli("upload", tmp_path / "m.gguf", "me/x")
    assert code == 1 and "log in" in err


def test_a_card_holds_only_facts(tmp_path):
    convert(write_micro(tmp_path / "m"), tmp_path / "m.gguf", "q8_0")
    file = read(tmp_path / "m.gguf", lambda *_: None)
    text = card("me/x", [file])
    assert "license" not in text and "2 Gated DeltaNet + 1 attention" in text and f"{file.bits:.2f}" in text
