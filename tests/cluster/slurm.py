"""Slurm on the hosts: the controller on the first, and a daemon on each."""

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.cluster.hosts import Ended, Host, environment

IDLE_LIMIT_S = 40.0

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={first}({address})
SlurmUser=root
AuthType=auth/none
CredType=cred/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobRequeue=1
ReturnToService=2
KillWait=5
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=60 State=UP
"""


class Slurm:
    """The commands of a running Slurm, on its first host."""

    def __init__(self, host: Host, configuration: Path) -> None:
        self.host, self.variables = host, {"SLURM_CONF": str(configuration)}

    def run(self, command: list[str], folder: Path, limit_s: float = 60) -> Ended:
        return self.host.run(command, folder, limit_s, **self.variables)

    def job(self, number: str) -> dict[str, str]:
        """Return what `scontrol show job` prints, by its names."""
        output = self.run(["scontrol", "-o", "show", "job", number], Path("/")).output
        return dict(word.partition("=")[::2] for word in output.split() if "=" in word)


@contextlib.contextmanager
def slurm(up: list[Host], folder: Path) -> Iterator[Slurm]:
    """Start Slurm with every host idle in one partition; end it with all processes that it started."""
    (folder / "state").mkdir()
    nodes = [f"NodeName={host.name} NodeAddr={host.address} CPUs=2 RealMemory=4000 State=UNKNOWN" for host in up]
    configuration = folder / "slurm.conf"
    text = CONFIGURATION.format(first=up[0].name, address=up[0].address, folder=folder, nodes="\n".join(nodes))
    configuration.write_text(text)
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    variables = environment() | {"SLURM_CONF": str(configuration)}
    daemons = []
    try:
        for host, program in [(up[0], "slurmctld"), *((host, "slurmd") for host in up)]:
            argv = host.argv([f"/usr/sbin/{program}", "-D"], folder)
            with (folder / f"{program}-{host.name}.out").open("wb") as log:
                started = subprocess.Popen(argv, env=variables, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
            daemons.append(started)
        running = Slurm(up[0], configuration)
        deadline = time.monotonic() + IDLE_LIMIT_S
        while (state := running.run(["sinfo", "-h", "-o", "%D %t"], folder).output.strip()) != f"{len(up)} idle":
            logs = "\n".join(path.read_text(errors="replace")[-2000:] for path in folder.glob("*.log"))
            assert time.monotonic() < deadline, f"{state}\n{logs}"
            time.sleep(0.2)
        yield running
    finally:
        for host in up:
            for line in host.processes():
                if "slurm" in line:
                    subprocess.run(host.argv(["kill", "-9", line.split()[0]], Path("/")), check=False)
        for daemon in daemons:
            with contextlib.suppress(ProcessLookupError):
                os.kill(daemon.pid, 9)
            daemon.wait()
