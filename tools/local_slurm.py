"""A SLURM cluster of several nodes on this one machine, to try batch jobs on: `python tools/local_slurm.py up FOLDER`.

It needs the commands of Debian's packages slurm-wlm and munge (`make slurm`), nothing of systemd, and no other SLURM.
All state lies in FOLDER; `down FOLDER` ends it. The commands find it by SLURM_CONF=FOLDER/slurm.conf.

Each node says that it has 4 cores, 6 GB and 2 GPUs, which are not there. A job in the partition `urgent` takes the
place of those in `cpu`, which queue again.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch")
SETTINGS = """\
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.sock,cred_expire=5
CryptoType=crypto/munge
SlurmctldPort={port}
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool.%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,batch_sched_delay=0,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
SlurmdTimeout=15
SlurmctldTimeout=10
InactiveLimit=0
UnkillableStepTimeout=20
MinJobAge=600
MaxArraySize=1001
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
GresTypes=gpu
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] \
CPUs=4 RealMemory=6000 Gres=gpu:2 State=UNKNOWN
PartitionName=cpu Nodes=n[1-{nodes}] Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=n[1-{nodes}] MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
# slurmd wants a file for each GPU; any device will do. It loads a plugin for control groups without using it.
GPUS = "NodeName=n[1-{nodes}] Name=gpu File=/dev/tty[1-2]\n"
CGROUPS = "CgroupPlugin=cgroup/v1\n"
PORT = 16817
SECONDS = 30.0


def up(folder: Path, nodes: int) -> None:
    """Write the configuration and start the daemons; return when all nodes are idle."""
    missing = [name for name in COMMANDS if shutil.which(name) is None]
    if missing:
        sys.exit(f"error: {missing[0]}: no such command; on Debian and Ubuntu: make slurm")

    folder = folder.absolute()
    for name in ("state", "run", "log", *(f"spool.n{number}" for number in range(1, nodes + 1))):
        (folder / name).mkdir(parents=True, exist_ok=True)
    _write_settings(folder, nodes)
    _start_munge(folder)

    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    subprocess.run(["slurmctld", "-c"], check=True)
    for number in range(1, nodes + 1):
        start_node(f"n{number}")

    deadline = time.monotonic() + SECONDS
    while idle_nodes() < nodes:
        if time.monotonic() > deadline:
            sys.exit(f"error: the nodes did not come up in {SECONDS:.0f} seconds; see {folder}/log")
        time.sleep(0.2)


def down(folder: Path) -> None:
    """End the daemons of a folder, and the jobs with them."""
    run = folder.absolute() / "run"
    os.environ["SLURM_CONF"] = str(folder.absolute() / "slurm.conf")
    subprocess.run(["scancel", "--user", _user()], capture_output=True)
    deadline = time.monotonic() + SECONDS
    while _has_jobs() and time.monotonic() < deadline:
        time.sleep(0.2)
    for path in (*sorted(run.glob("slurmd.*.pid")), run / "slurmctld.pid", run / "munged.pid"):
        end(path)


def start_node(name: str) -> None:
    """Start the daemon of a node."""
    subprocess.run(["slurmd", "-N", name], check=True)


def idle_nodes() -> int:
    """Return how many nodes are up and idle."""
    ask = ["sinfo", "--noheader", "--Node", "--partition", "cpu", "--states", "idle", "--format", "%N"]
    return len(subprocess.run(ask, text=True, capture_output=True).stdout.split())


def _has_jobs() -> bool:
    return bool(subprocess.run(["squeue", "--noheader"], text=True, capture_output=True).stdout.strip())


def end(pid_file: Path) -> None:
    """End a daemon, if it runs, and wait until it has."""
    try:
        pid = int(pid_file.read_text())
        os.kill(pid, signal.SIGTERM)
    except (OSError, ValueError):
        return
    deadline = time.monotonic() + SECONDS
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)


def _write_settings(folder: Path, nodes: int) -> None:
    values = {
        "folder": folder,
        "nodes": nodes,
        "host": socket.gethostname().partition(".")[0],
        "user": _user(),
        "port": PORT,
        "first": PORT + 1,
        "last": PORT + nodes,
    }
    (folder / "slurm.conf").write_text(SETTINGS.format(**values))
    (folder / "gres.conf").write_text(GPUS.format(**values))
    (folder / "cgroup.conf").write_text(CGROUPS)


def _start_munge(folder: Path) -> None:
    """Start the daemon that vouches for users, with a key of this cluster's own."""
    key = folder / "munge.key"
    if not key.exists():
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
    for place in (folder, folder / "run"):
        place.chmod(0o755)

    run, log = folder / "run", folder / "log"
    subprocess.run(
        [
            "munged",
            f"--key-file={key}",
            f"--socket={run}/munge.sock",
            f"--pid-file={run}/munged.pid",
            f"--seed-file={run}/munge.seed",
            f"--log-file={log}/munged.log",
        ],
        check=True,
    )


def _user() -> str:
    return subprocess.run(["id", "-un"], text=True, capture_output=True, check=True).stdout.strip()


def main() -> None:
    """Parse the command line, and start or end a cluster."""
    parser = argparse.ArgumentParser(description="Start or end a SLURM cluster on this machine.")
    parser.add_argument("action", choices=("up", "down"))
    parser.add_argument("folder", type=Path, help="where all its state lies")
    parser.add_argument("--nodes", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.action == "down":
        down(arguments.folder)
        return
    up(arguments.folder, arguments.nodes)
    print(f"{arguments.nodes} nodes are up; next: export SLURM_CONF={arguments.folder.absolute()}/slurm.conf")


if __name__ == "__main__":
    main()
