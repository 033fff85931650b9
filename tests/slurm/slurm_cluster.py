"""A real SLURM cluster on this machine: munged, slurmctld and a slurmd a node, on loopback, in a directory of its own.

Each node has its own mount, host name and process namespaces, so that it has a name that resolves and can be killed as
a crash would. The machine's hosts file, host name and SLURM configuration are left alone.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "unshare", "setpriv")
FINISHED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE")

CONFIG = """\
ClusterName=nuteprune
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={top}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={top}/state
SlurmdSpoolDir={top}/spool/%n
SlurmctldPidFile={top}/slurmctld.pid
SlurmdPidFile={top}/slurmd-%n.pid
SlurmctldLogFile={top}/slurmctld.log
SlurmdLogFile={top}/slurmd-%n.log
MailProg=/bin/true
RebootProgram=/bin/true
PlugStackConfig={top}/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1,batch_sched_delay=0
MpiDefault=none
JobRequeue=1
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=10
KillWait=3
MinJobAge=3600
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing_programs() -> list[str]:
    """What keeps this machine from running a cluster; empty where nothing does."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    return missing + (["root's rights"] if os.geteuid() else [])


class Cluster:
    """Started by `start`, gone after `stop`; `env` lets SLURM's commands find it.

    Args:
        nodes: how many nodes, named node1, node2, ….
    """

    def __init__(self, nodes: int = 2):
        self.top = Path(tempfile.mkdtemp(prefix="np-slurm-", dir="/tmp"))  # short: a socket's path has 107 bytes
        self.names = [f"node{k + 1}" for k in range(nodes)]
        self.env = {**os.environ, "SLURM_CONF": str(self.top / "slurm.conf")}
        self.daemons: dict[str, subprocess.Popen] = {}

    def start(self) -> None:
        """Start every daemon and wait until all nodes are idle."""
        ports = _free_ports(1 + len(self.names))
        host = socket.gethostname().split(".")[0]
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=1000"
            for name, port in zip(self.names, ports[1:], strict=True)
        )
        config = CONFIG.format(host=host, controller_port=ports[0], top=self.top, nodes=nodes)
        (self.top / "slurm.conf").write_text(config)
        (self.top / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        (self.top / "plugstack.conf").write_text("")
        (self.top / "hosts").write_text(f"127.0.0.1 localhost {host} {' '.join(self.names)}\n")
        (self.top / "munge.key").write_bytes(os.urandom(1024))
        (self.top / "munge.key").chmod(0o600)
        (self.top / "state").mkdir()
        for name in self.names:
            (self.top / "spool" / name).mkdir(parents=True)
        files = [f"--{kind}={self.top}/munge.{end}" for kind, end in
                 (("socket", "socket"), ("key-file", "key"), ("pid-file", "pid"), ("log-file", "log"),
                  ("seed-file", "seed"))]  # fmt: skip
        self._spawn("munged", ["munged", "--foreground", "--force", *files])
        wait_for((self.top / "munge.socket").exists, 10, "munged")
        self._spawn("slurmctld", self._with_hosts("exec slurmctld -D -c"))
        for name in self.names:
            self.start_node(name)
        wait_for(lambda: self.nodes() == dict.fromkeys(self.names, "idle"), 30, f"idle nodes: {self.nodes}")

    def start_node(self, name: str) -> None:
        """Boot a node (again)."""
        # The shell is the node's init: it collects orphans, and the whole node ends with it.
        script = f"hostname {name} && {{ slurmd -D -N {name} & wait; }}"
        self._spawn(name, self._with_hosts(script, "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"))

    def crash_node(self, name: str) -> None:
        """End everything on a node at once, as a power cut would."""
        daemon = self.daemons.pop(name)
        daemon.kill()
        daemon.wait()

    def stop(self) -> None:
        """End all jobs and daemons and delete the directory."""
        for name in reversed(list(self.daemons)):
            daemon = self.daemons.pop(name)
            if name == "slurmctld":
                daemon.terminate()
            else:
                daemon.kill()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self.top, ignore_errors=True)

    def run(self, *command: str, **options) -> str:
        """Output of one of SLURM's commands; a failure raises with what it said."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=120, **options)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def nodes(self) -> dict[str, str]:
        """State of each node, empty while the controller does not answer."""
        done = subprocess.run(["sinfo", "-hN", "-o", "%N %t"], env=self.env, capture_output=True, text=True)
        return dict(line.split() for line in done.stdout.splitlines())

    def job(self, job: str) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        words = self.run("scontrol", "-o", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def pid(self, job: str, rank: int) -> int:
        """Process id of a rank of a job's step: the Python that nuteprune runs in."""
        wanted = {f"SLURM_JOB_ID={job}", f"SLURM_PROCID={rank}"}
        steps = {"SLURM_STEP_ID=0", "SLURM_STEP_ID=1"}  # a job's first start names its versions in a step before
        for process in Path("/proc").glob("[0-9]*"):
            try:
                environment = (process / "environ").read_bytes().decode().split("\0")
                command = (process / "cmdline").read_bytes()
            except OSError:  # gone meanwhile
                continue
            if wanted <= set(environment) and steps & set(environment) and b"nuteprune" in command:
                return int(process.name)
        raise AssertionError(f"job {job} has no rank {rank}")

    def wait_job(self, job: str, *states: str, limit: float = 300) -> dict[str, str]:
        """Wait until a job is in one of the states (default: any final one); returns its fields."""
        wanted = states or FINISHED
        wait_for(lambda: self.job(job)["JobState"] in wanted, limit, lambda: f"job {job}: {self.job(job)}")
        return self.job(job)

    def _with_hosts(self, script: str, *namespaces: str) -> list[str]:
        mount = f"mount --bind {self.top}/hosts /etc/hosts && {script}"
        return ["unshare", "--mount", "--propagation", "private", *namespaces, "bash", "-c", mount]

    def _spawn(self, name: str, command: list[str]) -> None:
        # A cluster must not outlive a test run that is killed.
        with (self.top / f"{name}.out").open("ab") as out:
            self.daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command], env=self.env, stdin=subprocess.DEVNULL, stdout=out,
                stderr=out,
            )  # fmt: skip


def wait_for(condition: Callable[[], bool], limit: float, what: str | Callable[[], str]) -> None:
    """Poll until the condition holds; fails with `what` after `limit` seconds."""
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, f"not within {limit} s: {what() if callable(what) else what}"
        time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()
