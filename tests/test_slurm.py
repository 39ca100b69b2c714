"""The script for Slurm in docs/processes.md, and sweeps, on a Slurm of one machine.

Debian: slurmctld slurmd munge; as root. The sweep needs submitit.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
CONFIG = """
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=debug Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A running Slurm; the environment of its commands."""
    if os.geteuid() != 0 or not all(map(shutil.which, PROGRAMS)):
        pytest.skip(f"requires root and {', '.join(PROGRAMS)}")
    for folder in ("/run/munge", "/var/log/munge", "/var/lib/munge"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        shutil.chown(folder, "munge", "munge")
    if not Path("/run/munge/munge.socket.2").exists():
        subprocess.run(["su", "-s", "/bin/sh", "munge", "-c", "munged --force"], check=True)
    for name in ("state", "spool"):
        (tmp_path / name).mkdir()
    host = socket.gethostname().partition(".")[0]
    (tmp_path / "slurm.conf").write_text(CONFIG.format(host=host, folder=tmp_path))
    environment = os.environ | {"SLURM_CONF": str(tmp_path / "slurm.conf")}
    daemons = ("slurmctld", "slurmd")
    try:
        for daemon in daemons:
            subprocess.run([daemon], env=environment, check=True)
            time.sleep(3)
        yield environment
    finally:
        subprocess.run(["scancel", "--user", "root"], env=environment, check=False)
        time.sleep(3)
        for daemon in reversed(daemons):
            if (tmp_path / f"{daemon}.pid").exists():
                os.kill(int((tmp_path / f"{daemon}.pid").read_text()), 15)


def of_this_checkout(repository: Path) -> dict[str, str]:
    roots = [repository, repository / "kernels", repository / "experiments"]
    others = [os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else []
    return {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([*map(str, roots), *others]),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
    }


def test_the_script_of_the_documentation_trains(
    slurm: dict[str, str], repository: Path, tmp_path: Path
) -> None:
    page = (repository / "docs" / "processes.md").read_text()
    (script,) = re.findall(r"```bash\n(#!/bin/bash\n.*?)```", page, re.DOTALL)
    short = " --config.training.steps=8 --config.training.eval_every=8"
    (tmp_path / "job.sh").write_text(script.rstrip() + short + "\n")
    environment = slurm | of_this_checkout(repository)
    done = subprocess.run(
        ["sbatch", "--wait", "job.sh"], cwd=tmp_path, env=environment, capture_output=True, timeout=500
    )
    output = "\n".join(file.read_text() for file in tmp_path.glob("bitnet-*.out"))
    assert done.returncode == 0, output
    result = json.loads((tmp_path / "runs" / "cluster" / "result.json").read_text())
    assert result["status"] == "finished"
    assert result["mesh"] == {"data": 1, "fsdp": 2, "context": 1, "tensor": 1}


STUDY = """
QUESTION = SOURCE = PAPER_EFFECT = "none"
TASK = SOURCE_TASK = "language modelling"
CLAIMS = ()
CONFIG, METRIC, BASELINE = "byte_lm:small", "valid_loss", "float32"
ARMS = {{"float32": {{"model.precision": "float32"}}, "ternary": {{}}}}
SEEDS = (0,)
COMMON = {{"data.source": {source!r}, "data.split": "tail", "training.steps": 600, "training.checkpoint_every": 100}}
"""


def test_a_run_of_a_sweep_that_is_out_of_time_requeues_itself_and_resumes(
    slurm: dict[str, str], repository: Path, tmp_path: Path
) -> None:
    pytest.importorskip("submitit")
    study, work = tmp_path / "toy", tmp_path / "work"
    study.mkdir()
    (study / "study.py").write_text(STUDY.format(source=str(repository / "README.md")))
    command = [sys.executable, "-m", "bitnet_jax.cli", "sweep", str(study), f"--workdir={work}"]
    command += ["--executor=slurm", "--jobs=2", "--cluster=timeout_min=60"]
    environment = slurm | of_this_checkout(repository)
    with (tmp_path / "sweep.log").open("w") as log:
        sweep = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)

    def told() -> str:
        outputs = [tmp_path / "sweep.log", *work.glob("submitit/*_log.*")]
        return "\n".join(f"--- {file.name}\n{file.read_text()}" for file in outputs)

    def until(true: Callable[[], object], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            assert sweep.poll() is None, told()
            assert time.monotonic() < deadline, told()
            time.sleep(0.5)

    try:
        first = work / "float32-seed0"
        until(lambda: any((first / "checkpoints").glob("[0-9]*")), 300)
        (job,) = {file.name.rpartition("_")[0] for file in work.glob("submitit/*_0_0_log.out")}
        # What Slurm does before the time is over; it is the job of the first run.
        subprocess.run(["scancel", "--signal=USR2", job.removesuffix("_0")], env=environment, check=True)
        until(lambda: "Requeued job" in told(), 120)
        assert not (first / "result.json").exists()
        assert "SIGTERM: saved step" in told()
        assert sweep.wait(900) == 0, told()
    finally:
        sweep.kill()
    rows = [json.loads(line) for line in (work / "results.jsonl").read_text().splitlines()]
    assert {(row["run"], row["status"], row["step"]) for row in rows} == {
        ("float32-seed0", "finished", 600), ("ternary-seed0", "finished", 600),
    }  # fmt: skip
    assert not (work / "float32-seed0.stale").exists(), "it went on from the checkpoint"
