"""Files appear whole or not at all: exceptions, kills, full disks, leftovers of the dead, neighbours of the living."""

import os
import signal
import subprocess
import sys
import time

import pytest

from hybridlm import atomic
from hybridlm.atomic import DiskFullError, atomic_write, atomic_write_all
from hybridlm.errors import HybridLMError

WRITER = """
import sys
from hybridlm.atomic import atomic_write
with atomic_write(sys.argv[1]) as f:
    f.write(b"half")
    f.flush()
    print("writing", flush=True)
    sys.stdin.read()
    f.write(b" and half")
"""


def names(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def start_writer(path) -> subprocess.Popen:
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert writer.stdout.readline() == b"writing\n"
    return writer


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, OSError])
def test_an_exception_leaves_what_was_there(error, tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(error), atomic_write(path) as file:
        file.write(b"new")
        raise error
    assert path.read_bytes() == b"old" and names(tmp_path) == ["a"]
    with atomic_write(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and names(tmp_path) == ["a"]


def test_several_files_or_none(tmp_path):
    (tmp_path / "old").write_bytes(b"")
    with pytest.raises(ValueError), atomic_write_all([tmp_path / "a", tmp_path / "b"], replacing=[tmp_path / "old"]):
        raise ValueError
    assert names(tmp_path) == ["old"]
    with atomic_write_all([tmp_path / "a", tmp_path / "b"], replacing=[tmp_path / "old"]) as (a, b):
        a.write(b"1")
        b.write(b"2")
    assert names(tmp_path) == ["a", "b"] and (tmp_path / "b").read_bytes() == b"2"


def test_permissions_are_those_of_open(tmp_path):
    with atomic_write(tmp_path / "a"):
        pass
    (tmp_path / "b").write_bytes(b"")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals and locks")
def test_a_killed_writer_leaves_nothing_that_the_next_does_not_clear(tmp_path):
    path = tmp_path / "a*[x].gguf"
    dead, alive = start_writer(path), start_writer(path)
    dead.send_signal(signal.SIGKILL)
    dead.wait()
    assert len(names(tmp_path)) == 2 and not path.exists()
    with atomic_write(path) as file:  # clears the dead one's, not the living one's
        file.write(b"mine")
    assert len(names(tmp_path)) == 2 and path.read_bytes() == b"mine"
    alive.communicate(b"")
    assert path.read_bytes() == b"half and half" and names(tmp_path) == [path.name]


def test_too_little_space_is_said_before_the_work(tmp_path):
    with pytest.raises(DiskFullError, match="GB are needed"), atomic_write(tmp_path / "a", size=1 << 60):
        pytest.fail("started")
    assert names(tmp_path) == []


@pytest.mark.skipif(os.name == "nt", reason="limits of POSIX")
def test_a_disk_that_fills_up(tmp_path):
    code = ("import resource, sys; from hybridlm.atomic import *\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
            "try:\n  with atomic_write(sys.argv[1]) as f:\n    f.write(bytes(100_000))\n"
            "except DiskFullError as e:\n  print(e)")
    said = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], capture_output=True, text=True, check=True)
    assert "nothing was written" in said.stdout and names(tmp_path) == []


def test_errors_of_the_caller_are_not_renamed(tmp_path):
    with pytest.raises(BrokenPipeError), atomic_write(tmp_path / "a"):
        raise BrokenPipeError
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(HybridLMError, match="cannot be written"), atomic_write(tmp_path / "file" / "a"):
        pass


def test_without_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "fcntl", None)
    (tmp_path / ".a.12345678.tmp").write_bytes(b"")
    with atomic_write(tmp_path / "a") as file:
        file.write(b"x")
    assert names(tmp_path) == ["a"]


def kill_at_random(command: list[str], delay: float) -> int | None:
    """Run, kill -9 after `delay` seconds; the exit status, None when it was killed."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    end = time.monotonic() + delay
    while time.monotonic() < end and process.poll() is None:
        time.sleep(0.002)
    if process.poll() is None:
        process.kill()
        process.wait()
        return None
    assert process.returncode == 0, process.stderr.read().decode()
    return 0
