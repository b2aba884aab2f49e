"""Names to files: what is converted, fetched, kept, and what is said when that cannot be."""

import contextlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.cli.micro import write_micro
from tests.store.hub_server import entry

from hybridlm.errors import HybridLMError, ModelNotFoundError
from hybridlm.formats.convert import convert
from hybridlm.formats.gguf_reader import GGUFFile
from hybridlm.store import resolve
from hybridlm.store.resolve import default_type


def served(hub) -> Path:
    return hub.root / "someone" / "micro"


def large_bytes(folder: Path) -> int:
    """What the hub serves from its second address."""
    return sum(e["size"] for e in map(entry, folder.iterdir()) if "sha256" in e)


def types(path: Path) -> set[str]:
    with GGUFFile.open(path) as file:
        return {t.type.name.lower() for t in file.tensors.values() if t.shape[-1:] and len(t.shape) > 1}


# -- files and folders -----------------------------------------------------------------------------------------------


def test_a_gguf_file_is_itself(tmp_path):
    file = tmp_path / "x.gguf"
    file.write_bytes(b"GGUF")
    assert resolve(file) == file and resolve(str(file)) == file


def test_a_folder_is_converted_once(tmp_path):
    folder = write_micro(tmp_path / "model")
    stages = []
    first = resolve(folder, progress=lambda *stage: stages.append(stage))
    assert "q8_0" in types(first) and stages[-1][0] == "converting to q8_0" and stages[-1][1] == stages[-1][2]
    stages.clear()
    assert resolve(folder, progress=lambda *stage: stages.append(stage)) == first and not stages
    other = resolve(f"{folder}:q4_0")
    assert other != first and "q4_0" in types(other) and first.is_file()
    assert resolve(f"{folder}:q4_m") not in (first, other)  # a mix of types


def test_a_changed_folder_is_converted_again_and_the_old_file_goes(tmp_path):
    folder = write_micro(tmp_path / "model")
    first = resolve(folder)
    write_micro(folder, seed=1)
    second = resolve(folder)
    assert second != first and not first.exists()
    tokenizer = folder / "tokenizer_config.json"
    tokenizer.write_text(tokenizer.read_text().replace("<|im_start|>", "<|x|>"))
    assert resolve(folder) != second


def test_the_folder_of_a_run_and_a_folder_of_gguf_files(tmp_path):
    write_micro(tmp_path / "run" / "hf")
    assert resolve(tmp_path / "run").name.startswith("hf-q8_0-")
    (tmp_path / "files").mkdir()
    for name in ("m-Q8_0.gguf", "m-q4_0.gguf"):
        (tmp_path / "files" / name).write_bytes(b"GGUF")
    assert resolve(tmp_path / "files").name == "m-q4_0.gguf"
    assert resolve(f"{tmp_path / 'files'}:q8_0").name == "m-Q8_0.gguf"


@pytest.mark.parametrize("name, words", [
    ("absent.gguf", "no such file"), ("./absent", "no such file"), ("a/b/c", "no such file"),
    ("owner/name:huge", "no type of weights"), ("nobody", "no such file"),
])
def test_names_that_stand_for_nothing(name, words, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFoundError, match=words):
        resolve(name)
    assert not hub.requests


def test_folders_that_are_no_model(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(HybridLMError, match="neither a GGUF file nor a model"):
        resolve(tmp_path / "empty")
    folder = write_micro(tmp_path / "model")
    with pytest.raises(HybridLMError, match="type: 'q9_9'"):
        resolve(f"{folder}:q9_9")
    with pytest.raises(HybridLMError, match="give the folder"):
        resolve(folder / "config.json")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../../etc/passwd"}}))
    with pytest.raises(HybridLMError, match="not an index"):
        resolve(folder)
    index.unlink()
    with pytest.raises(HybridLMError, match=r"no model\.safetensors"):
        resolve(folder)


def test_default_type_depends_on_size():
    assert default_type(25_000_000) == "q8_0" and default_type(7_430_870_688) == "q4_m"


# -- the hub ---------------------------------------------------------------------------------------------------------


def test_the_stand_in_speaks_as_the_hub_does(hub, tmp_path):
    """huggingface_hub's own client fetches a whole repository from it."""
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download("someone/micro", cache_dir=tmp_path / "c", endpoint=hub.url))
    for file in served(hub).iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes()


def test_a_repository_is_fetched_and_converted_once(hub, tmp_path):
    stages = []
    path = resolve("someone/micro", progress=lambda *stage: stages.append(stage))
    convert(served(hub), tmp_path / "direct.gguf", "q8_0", name="micro")
    assert path.read_bytes() == (tmp_path / "direct.gguf").read_bytes()
    assert hub.sent == large_bytes(served(hub))
    names = list(dict.fromkeys(name for name, _, _ in stages))
    assert names == ["looking up someone/micro", "downloading", "converting to q8_0"]
    done = [n for name, n, _ in stages if name == "downloading"]
    assert done == sorted(done) and stages[-1][1] == stages[-1][2]

    hub.requests.clear()
    assert resolve("someone/micro") == path and not hub.requests  # no network for what is known


def test_another_type_comes_from_the_kept_download(hub):
    resolve("someone/micro")
    hub.sent = 0
    assert "q4_0" in types(resolve("someone/micro:q4_0")) and hub.sent == 0
    assert "q4_0" in types(resolve("someone/micro", type="q4_0"))


def test_downloads_are_freed_when_asked(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HYBRIDLM_FREE_DOWNLOADS", "1")
    path = resolve("someone/micro")
    assert path.is_file() and not list((tmp_path / "home").rglob("*.safetensors"))


def test_revisions(hub):
    commit = hub.commit("someone/micro")
    assert resolve(f"someone/micro@{commit}") == resolve("someone/micro")
    with pytest.raises(ModelNotFoundError, match="no branch, tag or commit 'v2'"):
        resolve("someone/micro@v2")


def test_update_follows_the_weights_and_not_the_readme(hub):
    first = resolve("someone/micro")
    hub.sent = 0
    (served(hub) / "README.md").write_text("news")
    assert resolve("someone/micro", update=True) == first and hub.sent == 0
    write_micro(served(hub), seed=1)
    assert resolve("someone/micro") == first
    second = resolve("someone/micro", update=True)
    assert second != first and resolve("someone/micro") == second


def test_a_ready_file_is_preferred_where_its_type_fits(hub, monkeypatch):
    for type in ("q8_0", "q4_0"):
        convert(served(hub), served(hub) / f"micro-{type.upper()}.gguf", type)
    ready = served(hub) / "micro-Q8_0.gguf"
    hub.sent = 0
    assert resolve("someone/micro").read_bytes() == ready.read_bytes()
    assert hub.sent == ready.stat().st_size + sum(  # and of the rest only what tells the model's size
        e["size"] for e in map(entry, [served(hub) / "tokenizer.json", served(hub) / "model.safetensors.index.json"])
        if "sha256" in e)
    assert resolve("someone/micro:q4_0").name == "micro-Q4_0.gguf"
    # As if it were large: 4 bits will do, these too.
    monkeypatch.setattr(sys.modules["hybridlm.store.resolve"], "DEFAULT_LIMIT", 1000)
    assert resolve("someone/micro", update=True).name == "micro-Q4_0.gguf"
    assert "f16" in types(resolve("someone/micro:f16"))  # converted, as no such file is there


def test_a_repository_of_gguf_files_alone(hub):
    convert(served(hub), hub.root / "someone" / "only-Q8_0.gguf", "q8_0")
    repo = hub.root / "someone" / "files"
    repo.mkdir()
    (hub.root / "someone" / "only-Q8_0.gguf").rename(repo / "only-Q8_0.gguf")
    assert resolve("someone/files").name == "only-Q8_0.gguf"
    with pytest.raises(HybridLMError, match="GGUF files of type q8_0, so q4_0 cannot"):
        resolve("someone/files:q4_0")
    (hub.root / "someone" / "text").mkdir()
    (hub.root / "someone" / "text" / "README.md").write_text("nothing")
    with pytest.raises(HybridLMError, match="no safetensors weights and no GGUF"):
        resolve("someone/text")


def test_what_transformers_left_in_its_cache_is_used(hub):
    from huggingface_hub import snapshot_download

    snapshot_download("someone/micro", endpoint=hub.url)
    (hub.sent, small) = (0, large_bytes(served(hub)) - sum(
        f.stat().st_size for f in served(hub).glob("*.safetensors")))
    resolve("someone/micro")
    assert hub.sent <= small


def test_an_unknown_architecture_is_refused_before_the_weights_come(hub):
    config = json.loads((served(hub) / "config.json").read_text())
    (served(hub) / "config.json").write_text(json.dumps({**config, "model_type": "mystery"}))
    with pytest.raises(HybridLMError, match="'mystery' is not supported"):
        resolve("someone/micro")
    assert hub.sent <= large_bytes(served(hub)) - sum(f.stat().st_size for f in served(hub).glob("*.safetensors"))


def test_private_repositories_and_signed_addresses(hub, monkeypatch):
    """The token goes to the hub and not to the store that it redirects to, which would refuse it."""
    hub.token = "hf_secret"
    with pytest.raises(ModelNotFoundError, match=r"nor a repository on .* that you may see"):
        resolve("someone/micro")
    monkeypatch.delenv("HF_HUB_DISABLE_IMPLICIT_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert resolve("someone/micro").is_file()


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) < 300
    return text


def test_failures_are_one_clear_line(hub, monkeypatch, tmp_path):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(ModelNotFoundError) as error:
        resolve("someone/else")
    assert "neither a file or folder here nor a repository" in one_line(error)
    hub.faults.status = 503
    with pytest.raises(ModelNotFoundError) as error:
        resolve("someone/micro")
    assert "error 503" in one_line(error)
    hub.faults.status = None
    hub.gated.add("someone/micro")
    with pytest.raises(ModelNotFoundError) as error:
        resolve("someone/micro")
    assert "agreed to terms" in one_line(error)
    hub.gated.clear()
    for status, words in ((404, "no longer has a file"), (403, "refuses access"), (500, "what has arrived is kept")):
        hub.faults.status_of_files = status
        with pytest.raises(ModelNotFoundError) as error:
            resolve("someone/micro")
        assert words in one_line(error)
    hub.faults.status_of_files = None
    hub.faults.damage = True
    with pytest.raises(ModelNotFoundError) as error:
        resolve("someone/micro")
    assert "arrives damaged" in one_line(error)
    hub.faults.damage = False
    assert resolve("someone/micro").is_file()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert resolve("someone/micro").is_file()  # no network needed
    with pytest.raises(ModelNotFoundError) as error:
        resolve("someone/other")
    assert "cannot be reached" in one_line(error)


def test_a_full_disk_and_a_cache_that_cannot_be(hub, monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(HybridLMError) as error:
            resolve("someone/micro")
    assert "HYBRIDLM_HOME" in one_line(error)
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HYBRIDLM_HOME", str(tmp_path / "file" / "x"))
    with pytest.raises(HybridLMError, match="set HYBRIDLM_HOME"):
        resolve("someone/micro")


# -- broken lines and killed processes -------------------------------------------------------------------------------


def test_broken_connections_are_taken_up_where_they_broke(hub, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    size = large_bytes(served(hub))
    hub.faults.drop_after, hub.faults.drops = 50_000, 7
    assert resolve("someone/micro").is_file()
    assert hub.sent == size and hub.faults.drops == 0  # nothing arrived twice


def test_a_hub_that_knows_no_ranges(hub, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.faults.drop_after, hub.faults.drops, hub.faults.ignore_range = 50_000, 3, True
    path = resolve("someone/micro")
    assert path.is_file() and hub.sent > large_bytes(served(hub))


CODE = "import sys; from hybridlm.store import resolve; print(resolve(sys.argv[1]))"


def start(name="someone/micro") -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", CODE, name], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True)


@pytest.mark.parametrize("kills", [2, pytest.param(12, marks=pytest.mark.slow)])
def test_killed_processes_resume(hub, tmp_path, kills):
    """kill -9 in the middle of a download, again and again; the parts stay, the result is right."""
    shards = sorted(served(hub).glob("*.safetensors"))
    size = sum(f.stat().st_size for f in shards)
    parts = tmp_path / "home" / "hub" / "someone--micro" / "downloads"

    def arrived() -> int:
        total = 0
        for file in parts.rglob("model-*"):
            with contextlib.suppress(FileNotFoundError):  # just renamed
                total += file.stat().st_size
        return total

    hub.faults.rate = size  # a second in all
    for kill in range(kills):
        process = start()
        while arrived() < size * (kill + 1) // (kills + 2):
            assert process.poll() is None, process.stderr.read()
        process.kill()
        process.wait()
    before = arrived()
    assert before > 0 and not list((tmp_path / "home").rglob("*.gguf"))
    hub.faults.rate = None
    hub.requests.clear()
    out, errors = start().communicate()
    asked = {path: int(part.removeprefix("bytes=").rstrip("-")) for _, path, part in hub.requests if "/cdn/" in path}
    assert sum((served(hub) / Path(path).name).stat().st_size - first for path, first in asked.items()) == size - before
    convert(served(hub), tmp_path / "direct.gguf", "q8_0", name="micro")
    assert Path(out.strip()).read_bytes() == (tmp_path / "direct.gguf").read_bytes(), errors


def test_two_processes_at_once_do_it_once(hub):
    hub.faults.rate = 2 * large_bytes(served(hub))  # half a second
    both = [start(), start()]
    results = [p.communicate() for p in both]
    assert results[0][0] == results[1][0] != "" and hub.sent == large_bytes(served(hub)), results
