"""A real SLURM cluster in a throw-away folder: munge, slurmctld and two slurmd on this host.

Its GPUs are character devices. Needs Debian's slurmctld, slurmd, slurm-client and munge (with
`accounting` also slurmdbd and mariadb-server), and root. Nothing outside the folder is touched;
`stop` ends every daemon and every job.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
CONFIGURATION = """
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket={d}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={d}/state
SlurmdSpoolDir={d}/spool.%n
SlurmctldPidFile={d}/slurmctld.pid
SlurmdPidFile={d}/slurmd.%n.pid
SlurmctldLogFile={d}/slurmctld.log
SlurmdLogFile={d}/slurmd.%n.log
SlurmctldPort={port}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=2
JobAcctGatherParams=OverMemoryKill
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
MpiDefault=none
KillWait={kill_wait}
MinJobAge={min_job_age}
SlurmdTimeout=30
MessageTimeout=20
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,defer_batch
MaxArraySize=10001
MaxJobCount=20000
GresTypes=gpu
{accounting}
{nodes}
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime={grace}
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=short Nodes=ALL MaxTime=2 State=UP PriorityTier=1
"""


def missing() -> list[str]:
    """What a cluster needs and is not here."""
    found = [
        name
        for name in PROGRAMS
        if shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin") is None
    ]
    return found + ([] if os.geteuid() == 0 else ["root"])


def free_ports(count: int) -> list[int]:
    """All different, since they are held together."""
    with ExitStack() as stack:
        held = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in held:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in held]


class Cluster:
    """Started on creation; `environment` is what clients need."""

    def __init__(
        self,
        folder: Path,
        nodes: int = 2,
        cpus: int = 2,
        gpus: int = 2,
        accounting: bool = False,
        kill_wait: int = 5,
        grace: int = 20,
        min_job_age: int = 300,
    ):
        self.folder, self.names = folder, [f"n{i + 1}" for i in range(nodes)]
        folder.mkdir(parents=True)
        (folder / "state").mkdir()
        self.environment = os.environ | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{os.environ['PATH']}:/usr/sbin",
        }
        self.daemons: dict[str, subprocess.Popen] = {}
        controller, self._dbd_port, self._sql_port, *ports = free_ports(3 + nodes)
        lines = [
            f"NodeName={name} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={port} "
            f"CPUs={cpus} RealMemory=100000 Gres=gpu:{gpus} State=UNKNOWN"
            for name, port in zip(self.names, ports, strict=True)
        ]
        text = CONFIGURATION.format(
            host=socket.gethostname().split(".")[0],
            d=folder,
            port=controller,
            nodes="\n".join(lines),
            kill_wait=kill_wait,
            grace=grace,
            min_job_age=min_job_age,
            accounting=self._accounting() if accounting else "",
        )
        (folder / "slurm.conf").write_text(text)
        (folder / "gres.conf").write_text(
            "AutoDetect=off\n"
            + "".join(
                f"NodeName={name} Name=gpu File={self._devices(gpus)}\n"
                for name in self.names
                if gpus
            )
        )
        try:
            self._start_all(accounting)
        except BaseException:
            self.stop()
            raise

    def _start_all(self, accounting: bool) -> None:
        folder = self.folder
        self._start(
            "munge",
            "munged",
            "--foreground",
            "--force",
            f"--socket={folder}/munge.socket",
            f"--key-file={self._key()}",
            f"--pid-file={folder}/munged.pid",
            f"--seed-file={folder}/munged.seed",
            f"--log-file={folder}/munged.log",
        )
        self._until(lambda: (folder / "munge.socket").exists(), "munge")
        if accounting:
            self._start_accounting()
        self.start_controller(clean=True)
        for name in self.names:
            self.start_node(name)
        self._until(lambda: self.states() == dict.fromkeys(self.names, "idle"), "nodes")

    def _key(self) -> Path:
        path = self.folder / "munge.key"
        path.write_bytes(os.urandom(128))
        path.chmod(0o400)
        return path

    def _devices(self, count: int) -> str:
        """Character devices like /dev/null; a terminal where we may not make any."""
        paths = [self.folder / f"gpu{i}" for i in range(count)]
        for path in paths:
            if (
                not path.exists()
                and subprocess.run(
                    ["mknod", str(path), "c", "1", "3"], capture_output=True
                ).returncode
            ):
                return "/dev/tty0"
        return f"{self.folder}/gpu[0-{count - 1}]" if count > 1 else str(paths[0])

    def _start(self, name: str, *command: str) -> None:
        log = open(self.folder / f"{name}.out", "ab")  # noqa: SIM115
        self.daemons[name] = subprocess.Popen(
            command, env=self.environment, stdout=log, stderr=log, start_new_session=True
        )

    def _until(self, ready: Callable[[], bool], what: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > end:
                logs = "\n".join(
                    f"{p.name}: {p.read_text(errors='replace')[-1500:]}"
                    for p in self.folder.glob("*.log")
                )
                raise RuntimeError(f"{what} not ready in {seconds:g} s\n{logs}")
            time.sleep(0.05)

    def start_controller(self, clean: bool = False) -> None:
        self._start("slurmctld", "slurmctld", "-D", *(["-c"] if clean else []))
        self._until(lambda: self.run("scontrol", "ping").returncode == 0, "slurmctld")

    def start_node(self, name: str) -> None:
        self._start(name, "slurmd", "-D", "-N", name)

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """End a daemon: slurmctld, or a node's."""
        self.daemons[name].send_signal(number)
        self.daemons[name].wait(timeout=60)

    def lose(self, name: str) -> None:
        """A node with everything that runs on it, and SLURM is told."""
        self.kill(name)
        for one in psutil.process_iter(["cmdline"]):
            if " ".join(one.info["cmdline"] or []).startswith("slurmstepd: "):
                with suppress(psutil.Error):
                    below = one.children(recursive=True)
                    if any(self._runs(process, SLURMD_NODENAME=name) for process in below):
                        for process in [*below, one]:
                            process.kill()
        self.run("scontrol", "update", f"nodename={name}", "state=down", "reason=lost")

    def kill_job(self, number: str) -> None:
        """Kill all that a job runs, as SLURM does KillWait seconds after it told a job to end."""
        for one in psutil.process_iter():
            if self._runs(one, SLURM_JOB_ID=number):
                with suppress(psutil.Error):
                    one.kill()

    def is_empty_after_kills(self) -> bool:
        """Whether no job is left; those that are left are killed."""
        left = self.jobs()
        for number in left:
            self.kill_job(number)
        return not left

    def _runs(self, process: psutil.Process, **variables: str) -> bool:
        """Whether a process belongs to a job of this cluster that has these variables."""
        with suppress(psutil.Error):
            found = process.environ()
            return {"SLURM_CONF": self.environment["SLURM_CONF"]} | variables == {
                k: found.get(k) for k in ("SLURM_CONF", *variables)
            }
        return False

    def run(self, *command: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=timeout
        )

    def states(self) -> dict[str, str]:
        """Node -> state in SLURM's words."""
        lines = self.run(
            "sinfo", "--noheader", "--Node", "--partition=gpu", "--format=%N %t"
        ).stdout.split("\n")
        return dict(line.split() for line in lines if line)

    def jobs(self) -> dict[str, str]:
        """Active jobs: id -> state."""
        lines = self.run("squeue", "--noheader", "--format=%i %T").stdout.split("\n")
        return dict(line.split() for line in lines if line)

    def stop(self) -> None:
        with suppress(subprocess.SubprocessError, OSError):  # where the controller never came up
            self.run("scancel", "--me", "--signal=KILL", timeout=10)
            self.run("scancel", "--me", timeout=10)
            end = time.monotonic() + 20
            while self.jobs() and time.monotonic() < end:
                time.sleep(0.2)
        for daemon in reversed(list(self.daemons.values())):
            daemon.terminate()
        for daemon in self.daemons.values():
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                os.killpg(daemon.pid, signal.SIGKILL)
        for one in psutil.process_iter():
            with suppress(psutil.Error):
                if self._runs(one) and "SLURM_JOB_ID" in one.environ():
                    one.kill()

    def _accounting(self) -> str:
        return (
            "AccountingStorageType=accounting_storage/slurmdbd\n"
            "AccountingStorageHost=127.0.0.1\n"
            f"AccountingStoragePort={self._dbd_port}\n"
            f"AccountingStoragePass={self.folder}/munge.socket"
        )

    def _start_accounting(self) -> None:
        d = self.folder
        (d / "sql").mkdir()
        (d / "sql").chmod(0o777)
        install = (
            "mariadb-install-db",
            "--no-defaults",
            f"--datadir={d}/sql",
            "--user=root",
            "--auth-root-authentication-method=normal",
        )
        made = self.run(*install)
        assert made.returncode == 0, made.stderr
        self._start(
            "mariadb",
            "mariadbd",
            "--no-defaults",
            f"--datadir={d}/sql",
            "--user=root",
            f"--socket={d}/sql.socket",
            "--bind-address=127.0.0.1",
            f"--port={self._sql_port}",
            f"--pid-file={d}/sql.pid",
        )
        sql = ["mariadb", "--no-defaults", f"--socket={d}/sql.socket", "-uroot", "-e"]
        self._until(lambda: self.run(*sql, "select 1").returncode == 0, "mariadb")
        self.run(
            *sql,
            "create user slurm@'127.0.0.1' identified by 'slurm'; "
            "create user slurm@localhost identified by 'slurm'; "
            "grant all on *.* to slurm@'127.0.0.1'; grant all on *.* to slurm@localhost",
        )
        path = d / "slurmdbd.conf"
        path.write_text(
            "AuthType=auth/munge\n"
            f"AuthInfo=socket={d}/munge.socket\n"
            "DbdHost=localhost\n"
            "DbdAddr=127.0.0.1\n"
            f"DbdPort={self._dbd_port}\n"
            "SlurmUser=root\n"
            f"LogFile={d}/slurmdbd.log\n"
            f"PidFile={d}/slurmdbd.pid\n"
            "StorageType=accounting_storage/mysql\n"
            "StorageHost=127.0.0.1\n"
            f"StoragePort={self._sql_port}\n"
            "StorageUser=slurm\n"
            "StoragePass=slurm\n"
            "StorageLoc=slurm\n"
        )
        path.chmod(0o600)
        self._start("slurmdbd", "slurmdbd", "-D")
        self._until(
            lambda: self.run("sacctmgr", "-i", "add", "cluster", "lab").returncode == 0, "slurmdbd"
        )
