"""The threads under the kernels: choice of instruction set, counts, forks, idleness, probes."""

import os
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from hybridlm import native


@pytest.fixture(autouse=True)
def _settings():
    isa, threads = native.isa(), native.threads()
    yield
    native.set_isa(isa)
    native.set_threads(threads)


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120,
                          env={**os.environ, **environment}, check=False)


WORK = """
    import numpy as np
    from hybridlm import native
    def work():
        x = np.random.default_rng(0).standard_normal((20, 512)).astype(np.float32)
        raw = np.zeros((300, 288), np.uint8)
        native.quantize(2, np.resize(x, (300, 512)), raw)
        out = np.empty((20, 300), np.float32)
        native.linear(x, [native.Matrix(raw, 2, 300, 512)], [out])
        return out
"""


def test_instruction_sets():
    names = native.available()
    assert names[0] == "scalar" and native.isa() in names
    for name in names:
        native.set_isa(name)
        assert native.isa() == name
    with pytest.raises(ValueError, match="scalar"):
        native.set_isa("abacus")
    assert native.isa() == names[-1]


def test_environment_chooses():
    code = "from hybridlm import native; print(native.isa(), native.threads())"
    assert run(code, HYBRIDLM_ISA="scalar", HYBRIDLM_THREADS="3").stdout.split() == ["scalar", "3"]
    refused = run(code, HYBRIDLM_ISA="abacus")
    assert refused.returncode != 0 and "HYBRIDLM_ISA" in refused.stderr and "scalar" in refused.stderr


def test_thread_counts():
    assert native.threads() >= 1
    for count in (1, 7, 2, 3, 1):
        native.set_threads(count)
        assert native.threads() == count
        raw = np.zeros((64, 34), np.uint8)
        native.quantize(8, np.ones((64, 32), np.float32), raw)
        assert (raw == raw[0]).all() and raw.any()
    with pytest.raises(ValueError, match="threads"):
        native.set_threads(0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_fork_after_work():
    """The child has none of the parent's threads and still computes; the parent goes on."""
    done = run(WORK + """
    import os
    native.set_threads(3)
    before = work()
    child = os.fork()
    if child == 0:
        os._exit(0 if native.threads() == 3 and np.array_equal(work(), before) else 1)
    status = os.waitpid(child, 0)[1]
    assert status == 0 and np.array_equal(work(), before)
    """)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_fork_while_another_thread_computes():
    done = run(WORK + """
    import os, threading
    native.set_threads(3)
    before, stop = work(), threading.Event()
    def busy():
        while not stop.is_set():
            work()
    thread = threading.Thread(target=busy)
    thread.start()
    for _ in range(10):
        child = os.fork()
        if child == 0:
            os._exit(0 if np.array_equal(work(), before) else 1)
        assert os.waitpid(child, 0)[1] == 0
    stop.set()
    thread.join()
    """)
    assert done.returncode == 0, done.stderr


def test_idle_threads_cost_nothing():
    done = run(WORK + """
    import time
    native.set_threads(4)
    work()
    time.sleep(0.2)
    start = time.process_time()
    time.sleep(1.0)
    print(time.process_time() - start)
    """)
    assert float(done.stdout) < 0.2, done.stderr


def test_exit_while_threads_sleep_or_spin():
    for pause in (0, 0.05):
        assert run(WORK + f"""
    import time
    native.set_threads(4)
    work()
    time.sleep({pause})
    """).returncode == 0


def test_probes():
    data = np.ones(8 << 20, np.uint8)
    assert native.read_bandwidth(data, 2) > 1e8
    with pytest.raises(ValueError, match="nothing"):
        native.read_bandwidth(data[:0])
    for name in native.available():
        native.set_isa(name)
        assert native.read_bandwidth(data[:1001]) > 0
        begin = time.monotonic()
        assert native.int8_peak(0.01) > 1e6
        assert time.monotonic() - begin < 60
