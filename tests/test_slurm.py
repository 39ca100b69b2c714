"""The script for Slurm in docs/processes.md, on a Slurm of one machine (Debian: slurmctld slurmd munge; as root)."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
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
        for daemon in reversed(daemons):
            if (tmp_path / f"{daemon}.pid").exists():
                os.kill(int((tmp_path / f"{daemon}.pid").read_text()), 15)


def test_the_script_of_the_documentation_trains(
    slurm: dict[str, str], repository: Path, tmp_path: Path
) -> None:
    page = (repository / "docs" / "processes.md").read_text()
    (script,) = re.findall(r"```bash\n(#!/bin/bash\n.*?)```", page, re.DOTALL)
    short = " --config.training.steps=8 --config.training.eval_every=8"
    (tmp_path / "job.sh").write_text(script.rstrip() + short + "\n")
    environment = slurm | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{repository}{os.pathsep}{repository / 'kernels'}",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
    }
    done = subprocess.run(
        ["sbatch", "--wait", "job.sh"], cwd=tmp_path, env=environment, capture_output=True, timeout=500
    )
    output = "\n".join(file.read_text() for file in tmp_path.glob("bitnet-*.out"))
    assert done.returncode == 0, output
    result = json.loads((tmp_path / "runs" / "cluster" / "result.json").read_text())
    assert result["status"] == "finished"
    assert result["mesh"] == {"data": 1, "fsdp": 2, "context": 1, "tensor": 1}
