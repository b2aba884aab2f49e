"""The CUDA kernels of the gated delta rule without a GPU: what they compute, on an emulator of the PTX they stand on,
and what they take of a Hopper multiprocessor, compiled offline."""

import ctypes
import hashlib
import itertools
import re
import shutil
import subprocess
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from hybridlm.ops import gated_delta_rule  # noqa: E402
from hybridlm.ops.cuda import delta_rule, launch, source  # noqa: E402

ROOM = Path(source.__file__).parent
NVCC = shutil.which("nvcc")
COMPILER = shutil.which("c++")
BUDGET = 65536  # registers of a multiprocessor


class Emulated:
    """In the place of a loaded kernel: the same source behind emulator.h, built by the system's compiler."""

    def __init__(self, text: str, name: str, folder: Path) -> None:
        structure = name.capitalize()
        files = text[text.index("// Tiles in shared memory"):]  # before it: defines, wgmma wrappers, ptx.cuh
        defines = "".join(re.findall(r"^#define .*\n", text, re.MULTILINE))
        program = f"{defines}{Path(__file__).with_name('emulator.h').read_text()}{files}"
        program += f"""
static {structure} parameters;
extern "C" void launch(const {structure}* p, int grid, int threads) {{
    parameters = *p, gridDim.x = grid;
    for (int b = 0; b < grid; ++b) run_block(b, threads, [] {{ {name}(parameters); }});
}}
"""
        stem = folder / hashlib.sha256(program.encode()).hexdigest()[:16]
        if not stem.with_suffix(".so").exists():
            stem.with_suffix(".cpp").write_text(program)
            subprocess.run([COMPILER, "-O2", "-w", "-std=c++17", "-shared", "-fPIC", "-o", stem.with_suffix(".so"),
                            stem.with_suffix(".cpp")], check=True)
        self._launch = ctypes.CDLL(str(stem.with_suffix(".so"))).launch

    def __call__(self, grid: int, threads: int, parameters: ctypes.Structure) -> None:
        self._launch(ctypes.byref(parameters), grid, threads)


@pytest.fixture
def emulated(monkeypatch, tmp_path_factory):
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.getbasetemp() / "emulated"
    folder.mkdir(exist_ok=True)
    for kernel in (launch._scan_kernel, launch._combine_kernel, launch._prepare_kernel, launch._gradient_kernel):
        kernel.cache_clear()
    monkeypatch.setattr(launch, "load", lambda text, name, shared: Emulated(text, name, folder))
    monkeypatch.setattr(launch, "_MULTIPROCESSORS", 3)
    yield
    for kernel in (launch._scan_kernel, launch._combine_kernel, launch._prepare_kernel, launch._gradient_kernel):
        kernel.cache_clear()


def inputs(time, *, batch=1, key_heads=1, heads=1, key=96, value=64, beta=None, spread=None, decay=0.5, seed=0):
    r = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=r)

    k = normal(batch, time, key_heads, key)
    if spread is not None:
        k = normal(batch, 1, key_heads, key) + spread * k
    b = 2 * torch.sigmoid(2 * normal(batch, time, heads)) if beta is None else torch.full((batch, time, heads), beta)
    g = -decay * torch.rand(batch, time, heads, generator=r)
    return [normal(batch, time, key_heads, key).bfloat16(), k.bfloat16(), normal(batch, time, heads, value).bfloat16(),
            g, b], normal(batch, heads, key, value)


def errors(x, start, *, bounds=None, norm=True, backward=True):
    """Relative errors of (o, state) and of the gradients of (q, k, v, g, beta, initial state)."""
    leaves = [t.double().requires_grad_() for t in (*x, start) if t is not None]
    o, state = gated_delta_rule(*leaves[:5], initial_state=None if start is None else leaves[5],
                               cu_seqlens=bounds, qk_l2norm=norm)
    cu = None if bounds is None else bounds.int()
    got = list(delta_rule.forward(*x, start, cu, norm))
    want = [o, state]
    if backward:
        r = torch.Generator().manual_seed(1)
        do, dstate = torch.randn(o.shape, generator=r).to(x[2]), torch.randn(state.shape, generator=r).to(x[3])
        want += torch.autograd.grad((o, state), leaves, (do.double(), dstate.double()))
        records = delta_rule.prepare(*x, cu, norm)
        got += [t for t in delta_rule.backward(do, dstate, *x, start, cu, norm, records) if t is not None]
    return [float((a.double() - b.detach()).norm() / b.detach().norm()) for a, b in zip(got, want, strict=True)]


@pytest.mark.parametrize(("time", "options"), [
    (70, {"heads": 2, "value": 192}),
    (129, {"batch": 2, "key": 64, "value": 128}),
    (64, {"key": 128, "key_heads": 2, "heads": 4}),
    (1, {"batch": 2, "heads": 3}),
    (40, {"key": 16, "decay": 20.0}),
])
def test_kernels_compute_the_recurrence(emulated, time, options):
    x, start = inputs(time, **options)
    if options.get("key") == 128:  # unnormalised keys blow the state up, which is the point of the norm
        x[0], x[1] = (t / t.float().norm(dim=-1, keepdim=True).bfloat16() for t in x[:2])
    found = errors(x, start, norm=options.get("key") != 128)
    assert max(found[:2]) < 4e-3 and max(found[2:]) < 2e-2, found


def test_alternating_writes_keep_their_digits(emulated):
    """beta near 2 and keys near collinear: T alternates between -2 and 2, and in bfloat16 would be wrong by a third."""
    x, start = inputs(130, beta=1.999, spread=0.05, decay=1e-4)
    assert max(errors(x, start, backward=False)) < 4e-2


def test_packed_rows(emulated):
    x, start = inputs(150, heads=2)
    bounds = torch.tensor([0, 1, 1, 66, 150])
    found = errors(x, start.expand(4, -1, -1, -1).contiguous(), bounds=bounds)
    assert max(found[:2]) < 4e-3 and max(found[2:]) < 2e-2, found


def test_a_reset_forgets_everything(emulated):
    x, start = inputs(80)
    x[3][:, 30] = float("-inf")
    o, state = delta_rule.forward(*x, start)
    after = [t[:, 30:].contiguous() for t in x]
    after[3][:, 0] = 0
    alone, same = gated_delta_rule(*(t.double() for t in after))
    assert float((o[:, 30:].double() - alone).norm() / alone.norm()) < 4e-3
    assert float((state.double() - same).norm() / same.norm()) < 4e-3


def test_the_width_of_a_block_changes_no_bit(emulated):
    x, start = inputs(100, value=192)
    rows = launch.Rows.of(x[2], None)
    records = launch.prepare(rows, x[0], x[1], x[3], x[4], True)
    found = []
    for width in (1, 3):
        o, final = torch.empty_like(x[2]), torch.empty_like(start)
        launch.scan(rows, records, x[2], 96, o=o, initial=start, final=final, width=width)
        found.append((o, final))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_continuing_at_a_chunk_changes_no_bit(emulated):
    x, start = inputs(150)
    o, final = delta_rule.forward(*x, start)
    first, middle = delta_rule.forward(*(t[:, :128].contiguous() for t in x), start)
    second, last = delta_rule.forward(*(t[:, 128:].contiguous() for t in x), middle)
    assert torch.equal(o, torch.cat([first, second], 1)) and torch.equal(final, last)


@pytest.mark.parametrize(("time", "options"), [
    (300, {"value": 192, "decay": 0.01}),  # nothing forgotten
    (300, {"heads": 2, "decay": 1.5}),  # all forgotten within a chunk
    (310, {"batch": 2, "key": 64, "value": 128, "decay": 0.6}),  # some
    (260, {"key": 128, "key_heads": 2, "heads": 2, "decay": 0.6}),  # never, without a norm
])
def test_segments_side_by_side_compute_the_recurrence(emulated, monkeypatch, time, options):
    monkeypatch.setattr(launch, "_SHORTEST", 1)
    monkeypatch.setattr(launch, "_MULTIPROCESSORS", 4 * options.get("batch", 1) * options.get("heads", 1))
    x, _ = inputs(time, **options)
    norm = options.get("key") != 128
    cuts = launch.split(launch.Rows.of(x[2], None), x[2], x[1].shape[3], norm)
    assert cuts is not None and cuts.segments > 2
    if not norm:
        x[0], x[1] = (t / t.float().norm(dim=-1, keepdim=True).bfloat16() for t in x[:2])
    found = errors(x, None, norm=norm)
    assert max(found[:2]) < 4e-3 and max(found[2:]) < 2e-2, found


def test_where_segments_pay():
    v = torch.empty(1, 16384, 30, 192, device="meta")
    assert launch.split(launch.Rows.of(v, None), v, 96, True).segments == 4
    v = v.view(16, 1024, 30, 192)
    assert launch.split(launch.Rows.of(v, None), v, 96, True) is None


def test_blocks_fill_the_chip():
    assert launch.warpgroups(30, 96, 192) == 1 and launch.warpgroups(240, 96, 192) == 3
    assert launch.warpgroups(1000, 128, 192) == 1 and launch.warpgroups(1000, 128, 128) == 2
    assert launch.warpgroups(1000, 96, 64) == 1


KERNELS = [("prepare", 96), ("gradient", 96), ("gradient", 128)] + [
    (f"{kind} {width}", key) for kind, (width, key) in itertools.product(
        ("output", "writes", "reverse", "summary", "reverse-summary"), ((1, 96), (3, 96), (2, 128)))]


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@pytest.mark.parametrize(("kernel", "key"), KERNELS)
def test_fits_a_multiprocessor(monkeypatch, tmp_path, kernel, key):
    """Registers and shared memory, few spills, and tensor-core work that the compiler leaves asynchronous."""
    taken = {}

    def compile_offline(text, name, shared):
        file = tmp_path / "kernel.cu"
        file.write_text(text)
        done = subprocess.run([NVCC, "-gencode=arch=compute_90a,code=sm_90a", "-std=c++17", "-Xptxas", "-v", "-cubin",
                               "-o", tmp_path / "kernel.cubin", file], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        taken.update(shared=shared, log=done.stdout + done.stderr)

    monkeypatch.setattr(launch, "load", compile_offline)
    kind, *width = kernel.split()
    if kind == "prepare":
        launch._prepare_kernel.__wrapped__(key, 0)
        threads = 128 * 4  # four blocks at a time
    elif kind == "gradient":
        launch._gradient_kernel.__wrapped__(key, 0)
        threads = 384
    else:
        launch._scan_kernel.__wrapped__(key, int(width[0]), kind == "output", "reverse" in kind, "summary" in kind, 0)
        threads = (int(width[0]) + 1) * 128
    log = taken["log"]
    assert "serialized" not in log, log
    assert int(re.search(r"Used (\d+) registers", log)[1]) * threads <= BUDGET
    assert int(re.search(r"(\d+) bytes spill stores", log)[1]) <= 80, log  # by whoever brings tiles
    assert taken["shared"] <= (227 * 1024) // (4 if kind == "prepare" else 1)


# -- on a GPU --------------------------------------------------------------------------------------------------------

@pytest.mark.gpu
@pytest.mark.parametrize("options", [
    {"time": 1000, "heads": 3, "value": 192}, {"time": 300, "key": 128, "value": 128, "batch": 2},
    {"time": 333, "key": 64, "key_heads": 2, "heads": 4}, {"time": 500, "beta": 1.999, "spread": 0.05, "decay": 1e-4},
])
def test_on_the_gpu(options):
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    x, start = inputs(**options)
    found = errors([t.cuda() for t in x], start.cuda(), backward="spread" not in options)
    assert max(found[:2]) < (8e-2 if "spread" in options else 4e-3) and max(found) < 8e-2, found
