"""The NEON kernels, cross-compiled and run under qemu-user, against the scalar ones, which are held to float64."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "src" / "hybridlm" / "native" / "csrc"


@pytest.mark.arm
def test_neon_agrees_with_scalar(tmp_path):
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if not compiler or not emulator:
        pytest.skip("needs g++-aarch64-linux-gnu and qemu-user")
    flags = ["-std=c++20", "-O2", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", f"-I{SOURCES}"]
    parts = {SOURCES / "isa_scalar.cpp": [], SOURCES / "isa_neon.cpp": ["-march=armv8.2-a+dotprod+fp16"],
             Path(__file__).with_name("arm_check.cpp"): []}
    jobs = [subprocess.Popen([compiler, *flags, *extra, "-c", str(source), "-o", str(tmp_path / f"{source.stem}.o")])
            for source, extra in parts.items()]
    assert all(job.wait() == 0 for job in jobs)
    program = tmp_path / "check"
    objects = [str(tmp_path / f"{source.stem}.o") for source in parts]
    subprocess.run([compiler, "-static", *objects, "-o", str(program)], check=True)
    done = subprocess.run([emulator, str(program)], capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
