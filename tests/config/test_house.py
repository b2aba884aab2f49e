"""The shape of the house: which room leans on which, who may touch PyTorch, and what must not be in the files."""

import ast
import os
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "hybridlm"

# room -> rooms it may import; the table of docs/architecture.md. `errors` and `atomic` are everybody's.
MAY = {
    "errors": set(), "atomic": set(), "config": set(), "text": set(), "ops": set(), "native": set(),
    "formats": {"config", "text", "native"},
    "model": {"config", "formats", "ops"},
    "engine": {"config", "text", "formats", "native", "ops"},
    "quantize": {"config", "text", "formats", "native", "engine", "evals"},
    "store": {"config", "formats", "quantize"},
    "data": {"config", "text"},
    "evals": {"text", "data"},
    "server": {"text", "engine", "store"},
    "integrations": {"ops"},
    "train": {"config", "text", "data", "ops", "model", "evals", "formats"},
    "scaling": {"config"},
    "report": {"config", "scaling"},
}
# Meant so, against the table: a method of convenience that imports when called; an adapter that nothing else imports.
EXCEPT = {("config.py", "formats", False), ("evals/torch_scorer.py", "model", True),
          ("evals/lm_eval.py", "engine", False), ("evals/lm_eval.py", "store", False)}
TORCH = ("ops/", "model/", "train/", "integrations/", "evals/torch", "engine/cuda", "quickstart.py", "cli/train.py",
         "cli/quickstart.py")
TORCH_MODULES = {"torch", "triton", "transformers", "tensorboard"}


def imports(file: Path) -> list[tuple[str, bool]]:
    """(module, whether at the top) of all imports that happen when code runs, those in functions included."""
    found = []

    def visit(node: ast.AST, top: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.Import):
            found.extend((alias.name, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found.extend((f"{node.module}.{alias.name}", top) for alias in node.names)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, top and not inside)

    visit(ast.parse(file.read_text(encoding="utf-8")), True)
    return found


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(name: str) -> str:
    return name.split("/")[0].removesuffix(".py")


def test_rooms_lean_one_way():
    for file in modules():
        name = file.relative_to(PACKAGE).as_posix()
        room = room_of(name)
        if room not in MAY:
            assert room in ("__init__", "cli", "quickstart"), f"{name}: a room without a rule"
            continue
        for module, top in imports(file):
            parts = module.split(".")
            if parts[0] != "hybridlm" or len(parts) < 2:
                continue
            target = parts[1]
            if target in (room, "errors", "atomic", "__version__") or (name, target, top) in EXCEPT:
                continue
            assert target in MAY[room], f"{name} imports {module}; {room} may import {sorted(MAY[room]) or 'nothing'}"


def test_the_table_has_no_circles():
    done: list[str] = []
    while len(done) < len(MAY):
        ready = [room for room, needs in MAY.items() if room not in done and needs <= set(done)]
        assert ready, f"a circle among {sorted(set(MAY) - set(done))}"
        done += ready


def test_torch_stays_in_its_rooms():
    for file in modules():
        name = file.relative_to(PACKAGE).as_posix()
        if not name.startswith(TORCH):
            touched = {module.split(".")[0] for module, _ in imports(file)} & TORCH_MODULES
            assert not touched, f"{name} imports {touched}"


def test_the_checks_above_can_fail(tmp_path):
    file = tmp_path / "x.py"
    file.write_text("import torch\nif TYPE_CHECKING:\n    import a\ndef f():\n    from hybridlm.engine import Engine\n")
    assert imports(file) == [("torch", True), ("hybridlm.engine.Engine", False)]


BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "triton", "transformers", "safetensors", "pyarrow", "tensorboard"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
"""


def test_the_runtime_works_without_torch(tmp_path):
    """Import, convert, open, generate, score, by the package and by the command line, with PyTorch out of reach."""
    from tests.cli.micro import write_micro

    write_micro(tmp_path / "m")
    code = BLOCKED + f"""
import hybridlm, contextlib, io, json
from hybridlm.cli import main
def run(*a):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main(a)
    return out.getvalue()
folder = {str(tmp_path / 'm')!r}
print(json.loads(run("generate", folder, "the cat", "-n", "3", "--json"))["prompt_tokens"])
print(run("convert", folder, folder + ".gguf"))
print(run("inspect", folder + ".gguf"))
print(run("eval", "bpb", folder + ".gguf", {str(Path(__file__))!r}))
print(run("bench", "--preset", "tiny", "-p", "4", "-g", "2", "--no-probe", "--json"))
run("train", "tiny", "data=x", "out=y")
try:
    hybridlm.HybridLM
except ModuleNotFoundError as error:
    print("no", error.name)
print(sorted(m for m in sys.modules if m.split(".")[0] in ("torch", "safetensors")))
"""
    environment = {**os.environ, "HYBRIDLM_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    for words in ("2\n", "parameters", "bits per byte", "decode_tokens_per_s", "no torch\n[]"):
        assert words in done.stdout, done.stdout + done.stderr
    assert done.stderr.count("error:") == 1 and 'needs torch, which is not installed; pip install "hybridlm[train]"' \
        in done.stderr


@pytest.mark.slow
def test_a_fresh_environment_without_torch(tmp_path):
    """The wheel, built and installed alone: what is in it, and that it generates."""
    from tests.cli.micro import write_micro

    venv.create(tmp_path / "venv", with_pip=True)
    pip = [str(tmp_path / "venv" / "bin" / "pip"), "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", str(tmp_path), str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("hybridlm-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert any(re.search(r"hybridlm/native/_native\.[^/]*(so|pyd)$", n) for n in names)
    assert not [n for n in names if n.endswith((".gguf", ".cpp", ".inl", ".h")) or n.startswith(("models", "tests"))]
    subprocess.run([*pip, "install", str(wheel)], check=True)
    write_micro(tmp_path / "m")
    command = [str(tmp_path / "venv" / "bin" / "hybridlm"), "generate", str(tmp_path / "m"), "the cat", "-n", "3"]
    done = subprocess.run([*command, "--stats"], capture_output=True, text=True, cwd=tmp_path, check=False,
                          env={**os.environ, "HYBRIDLM_HOME": str(tmp_path / "home")})
    assert done.returncode == 0 and "generated" in done.stderr, done.stderr
    absent = subprocess.run([str(tmp_path / "venv" / "bin" / "python"), "-c", "import torch"], capture_output=True,
                            check=False)
    assert absent.returncode != 0


def test_no_file_names_a_place_of_this_machine():
    """Paths of whoever wrote it have no place in a repository."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    places = [str(ROOT), str(Path.home()) + "/", "/" + "work/", "/" + "home/", "/" + "Users/", "C:" + "\\Users"]
    places = [p for p in places if len(p) > 6 and p != "/root/"]
    for name in listed.stdout.decode().split("\0"):
        file = ROOT / name
        if not name or not file.is_file() or file.suffix in (".gguf", ".png"):
            continue
        text = file.read_text(encoding="utf-8", errors="replace")
        found = [p for p in places if p in text]
        assert not found, f"{name} names {found}"
