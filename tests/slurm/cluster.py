"""A SLURM cluster of two nodes on this machine's loopback: a controller, two daemons and munge, all real, in one folder."""

import contextlib
import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
NODES = ("127.0.0.11", "127.0.0.12")
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "scontrol")

CONFIG = """
ClusterName=dnaltest
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
ProctrackType={proctrack}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
EnforcePartLimits=ALL
KillWait=2
MailProg=/bin/true
ReturnToService=2
NodeName={nodes} NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=2 Boards=1 SocketsPerBoard=1 \
CoresPerSocket=2 ThreadsPerCore=1 RealMemory=1000
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
PartitionName=scrap Nodes=ALL MaxTime=INFINITE PriorityTier=1 GraceTime=30
PartitionName=vision Nodes=ALL MaxTime=INFINITE AllowAccounts=vision
"""
CGROUP = "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\nCgroupMountpoint=/sys/fs/cgroup\n"


def missing(cgroup: bool = False) -> str | None:
    """Why no cluster can be had here; None if it can."""
    if lacking := [name for name in PROGRAMS if _program(name) is None]:
        return f"{', '.join(lacking)} not found; Debian's packages slurm-wlm and munge have them"
    try:
        socket.gethostbyname(socket.gethostname())
    except OSError:
        return f"the name of this machine, {socket.gethostname()}, does not resolve; add it to /etc/hosts"
    if cgroup and not os.access("/sys/fs/cgroup/freezer", os.W_OK):
        return "this kernel offers no freezer cgroup (version 1) that may be written"
    return None


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class Cluster:
    """Started by its construction, two nodes idle; `stop` ends it. Raises RuntimeError, with the logs, if it does not start."""

    def __init__(self, cgroup: bool = False):
        # The path of a socket may be 107 bytes long.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm", dir="/tmp"))
        for name in ("munge", "state", "spool", "log"):
            (self.folder / name).mkdir()
        self.folder.chmod(0o755)
        (self.folder / "munge").chmod(0o711)
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        port = _free_ports(3)
        settings = {"port": port, "first": port + 1, "last": port + 2, "user": getpass.getuser(), "folder": self.folder}
        nodes = f"127.0.0.[{NODES[0].rpartition('.')[2]}-{NODES[1].rpartition('.')[2]}]"
        proctrack = "proctrack/cgroup" if cgroup else "proctrack/linuxproc"
        (self.folder / "slurm.conf").write_text(CONFIG.format(**settings, nodes=nodes, proctrack=proctrack))
        if cgroup:
            (self.folder / "cgroup.conf").write_text(CGROUP)
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))},
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "OMP_NUM_THREADS": "1",
        }
        try:
            self._start()
        except Exception:
            self.stop()
            raise

    def _start(self) -> None:
        munge = self.folder / "munge"
        options = [f"--{name}-file={munge / name}" for name in ("key", "pid", "log", "seed")]
        self.run(_program("munged"), "--origin=127.0.0.1", f"--socket={munge / 'sock'}", *options)
        self.run(_program("slurmctld"))
        for node in NODES:
            self.run(_program("slurmd"), "-N", node)
        self.wait(lambda: self.states() == ["idle", "idle"], 30, "nodes that are idle")

    def run(self, *command, check: bool = True, timeout: float = 120) -> subprocess.CompletedProcess:
        command = [str(word) for word in command]
        # Not by pipes: daemons would keep them open.
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            code = subprocess.run(command, stdout=out, stderr=err, env=self.environment, cwd=ROOT, timeout=timeout).returncode
            for file in (out, err):
                file.seek(0)
            found = subprocess.CompletedProcess(command, code, out.read().decode(), err.read().decode())
        if check and code:
            raise RuntimeError(f"{command}: {found.returncode}\n{found.stdout}{found.stderr}{self.logs()}")
        return found

    def states(self) -> list[str]:
        return self.run("sinfo", "-hN", "-p", "main", "-o", "%t", check=False).stdout.split()

    def submit(self, *arguments, check: bool = True) -> subprocess.CompletedProcess:
        """slurm/submit.py with these arguments."""
        return self.run(sys.executable, "slurm/submit.py", "--gpus-per-node", "0", "--time", "01:00:00", *arguments, check=check)

    def show(self, job: str) -> dict[str, str]:
        """What `scontrol show job` tells, for example JobState, Restarts, ExitCode."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", job, check=False).stdout))

    def state(self, job: str) -> str:
        return self.show(job).get("JobState", "gone")

    def ended(self, job: str, timeout: float = 240) -> str:
        """Wait until the job is over, and give its state."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "gone")
        self.wait(lambda: self.state(job) in over, timeout, f"the end of job {job}")
        return self.state(job)

    def wait(self, condition, timeout: float, what: str) -> None:
        until = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > until:
                raise RuntimeError(f"waited {timeout:.0f} s in vain for {what}\n{self.logs()}")
            time.sleep(0.1)

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        files = sorted((self.folder / "log").glob("*.log"))
        return "\n".join(f"{file.name}:\n" + file.read_text(errors="replace")[-1500:] for file in files)

    def controller(self, there: bool) -> None:
        """Start it, or end it and leave the nodes and their jobs alone."""
        if there:
            self.run(_program("slurmctld"))
        else:
            _end([self.folder / "slurmctld.pid"])

    def stop(self) -> None:
        if (self.folder / "slurmctld.pid").exists():
            self.run("scancel", "--user", getpass.getuser(), check=False)
            until = time.monotonic() + 30
            while self.run("squeue", "-h", check=False).stdout.strip() and time.monotonic() < until:
                time.sleep(0.2)
        # They take their pid files away at their end; as children of nobody they may stay as zombies.
        for patterns in (("slurmd.*.pid", "slurmctld.pid"), ("munge/pid",)):
            _end([file for pattern in patterns for file in self.folder.glob(pattern)])
        shutil.rmtree(self.folder, ignore_errors=True)


def _end(pid_files: list[Path]) -> None:
    pids = {}
    for file in pid_files:
        with contextlib.suppress(OSError, ValueError):
            pids[file] = int(file.read_text())
            os.kill(pids[file], signal.SIGTERM)
    until = time.monotonic() + 15
    while any(file.exists() for file in pids) and time.monotonic() < until:
        time.sleep(0.05)
    for file, pid in pids.items():
        with contextlib.suppress(OSError):
            if file.exists():
                os.kill(pid, signal.SIGKILL)


def _free_ports(count: int) -> int:
    """The first of so many ports in a row that nobody listens on, below those that the system hands out."""
    for first in range(20_000 + os.getpid() % 10_000, 32_000, count):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise RuntimeError("no free ports")


def main() -> None:
    """A cluster to try things on, until Ctrl-C: python tests/slurm/cluster.py"""
    if why := missing():
        sys.exit(f"error: {why}")
    cluster = Cluster(cgroup="--cgroup" in sys.argv)
    try:
        print(
            f"two nodes are idle; in another terminal:\n    export SLURM_CONF={cluster.folder}/slurm.conf\nCtrl-C ends them",
            flush=True,
        )
        signal.sigwait({signal.SIGINT, signal.SIGTERM})
    finally:
        cluster.stop()


if __name__ == "__main__":
    main()
