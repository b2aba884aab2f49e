"""The sbatch script as text, and as a program with stand-ins for Slurm's commands."""

import os
import re
import subprocess

import pytest

from hybridlm.cli import main
from hybridlm.errors import ConfigError
from hybridlm.train.slurm import sbatch


def options(script):
    return dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", script, re.MULTILINE))


def test_what_is_asked_of_slurm():
    script = sbatch("1b", ["data=my text/", "out=/shared/run"], nproc=8, nnodes="16", options={"time": "24:00:00"})
    asked = options(script)
    assert asked["nodes"] == "16" and asked["gpus-per-node"] == "8" and asked["ntasks-per-node"] == "1"
    assert asked["requeue"] == "" and asked["signal"] == "TERM@180" and asked["time"] == "24:00:00"
    assert "no-kill" not in asked and asked["open-mode"] == "append"
    assert "hybridlm train 1b 'data=my text/' out=/shared/run --nproc 8 --nnodes 16 --meet \"$meet\"" in script
    elastic = sbatch("1b", ["out=x", "device=cpu"], nproc=4, nnodes="6:8", options={"signal": "TERM@600"})
    asked = options(elastic)
    assert asked["nodes"] == "6-8" and "no-kill" in asked and "gpus-per-node" not in asked
    assert asked["signal"] == "TERM@600" and elastic.count("--signal") == 1
    assert "srun --kill-on-bad-exit=0 --no-kill" in elastic
    assert elastic.startswith("#!/bin/bash\n#SBATCH")


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (143, True), (1, False), (130, False)])
def test_it_queues_again_when_it_was_asked_to_stop(tmp_path, code, requeued):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, body in (("srun", f'echo "$@" > {tmp_path}/srun; exit {code}'),
                       ("scontrol", f'[ "$1" = show ] && printf "n7\\nn8\\n" || echo "$@" > {tmp_path}/requeue')):
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    script = sbatch("tiny", ["data=it's here", "out=o"], nproc=2, nnodes="2")
    done = subprocess.run(["bash", "-c", script], check=False, env={
        **os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "20123", "SLURM_JOB_NODELIST": "n[7-8]"})
    assert done.returncode == code
    assert (tmp_path / "srun").read_text().strip() == \
        "--kill-on-bad-exit=0 hybridlm train tiny data=it's here out=o --nproc 2 --nnodes 2 --meet n7:20123"
    assert (tmp_path / "requeue").exists() == requeued
    if requeued:
        assert (tmp_path / "requeue").read_text() == "requeue 20123\n"


def test_by_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as done:
        main(["train", "1b", "data=x", "out=y", "--nproc", "8", "--nnodes", "2", "--slurm", "run.sbatch",
              "--sbatch", "time=1:00:00", "--sbatch", "partition=gpu"])
    assert done.value.code == 0 and "sbatch run.sbatch" in capsys.readouterr().out
    asked = options((tmp_path / "run.sbatch").read_text())
    assert asked["partition"] == "gpu" and not (tmp_path / "y").exists()
    with pytest.raises(SystemExit):
        main(["train", "1b", "data=x", "out=y", "--slurm", "-"])
    assert capsys.readouterr().out.startswith("#!/bin/bash")


def test_what_makes_no_sense():
    with pytest.raises(ConfigError, match="out: missing"):
        sbatch("1b", ["data=x"], nproc=8)
    with pytest.raises(ConfigError, match="no long option"):
        sbatch("1b", ["out=x"], nproc=8, options={"time=1\nrm": "x"})
