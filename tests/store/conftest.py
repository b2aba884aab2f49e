"""Each test has its own cache, no token, and a hub of its own."""

import pytest
from tests.cli.micro import write_micro
from tests.store.hub_server import HubServer


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "HYBRIDLM_FREE_DOWNLOADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    monkeypatch.setenv("HYBRIDLM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    write_micro(tmp_path / "served" / "someone" / "micro")
    with HubServer(tmp_path / "served") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server
