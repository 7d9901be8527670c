"""A SLURM of two nodes on this one machine, for tests: root and Debian's packages are enough.

    python scripts/slurm/cluster.py up       # installs what is missing, starts, says how to use it
    python scripts/slurm/cluster.py down     # cancels its jobs and stops what `up` started
    python scripts/slurm/cluster.py why-not  # exit code 1 and a reason where it cannot run

Everything it keeps lies in one folder, so that a SLURM that is configured here stays as it is;
only names of the nodes are added to /etc/hosts, and `down` takes them away again. The commands
find it by `SLURM_CONF`, which `up` prints.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path("/run/unlabeled-slurm")  # pids, sockets, configuration, logs
CONF = HERE / "etc/slurm.conf"
NODES = ("unlabeled1", "unlabeled2")
MARK = "# unlabeled-slurm"
PACKAGES = ["munge", "slurmctld", "slurmd", "slurm-client", "slurmdbd"]
PACKAGES += ["mariadb-server-core", "mariadb-client-core"]
PROGRAMS = ["munged", "slurmctld", "slurmd", "slurmdbd", "sbatch", "mariadbd", "mariadb-install-db"]
PORT = 27817  # of the controller; the others' follow
CPUS = 4  # that each node claims, whatever the machine has

ENV = {**os.environ, "SLURM_CONF": str(CONF), "MYSQL_UNIX_PORT": str(HERE / "db.sock")}
ENV["PATH"] = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"

SLURM_CONF = """\
ClusterName=unlabeled
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# a job that goes back in the queue waits for cred_expire and a second, 121 s if nothing is said
AuthInfo=socket={here}/munge.sock,cred_expire=5
MpiDefault=none
MailProg=/bin/true
# signals reach every process of a step, data workers too: the hardest case
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
ReturnToService=2
KillWait=15
MinJobAge=3600
SlurmctldTimeout=60
SlurmdTimeout=60
StateSaveLocation={here}/state
SlurmdSpoolDir={here}/%n
SlurmctldPidFile={here}/slurmctld.pid
SlurmdPidFile={here}/slurmd-%n.pid
SlurmctldLogFile={here}/log/slurmctld.log
SlurmdLogFile={here}/log/slurmd-%n.log
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePort={dbd}
AccountingStoragePass={here}/munge.sock
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=30 PriorityTier=1 \
PreemptMode=REQUEUE GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE DefaultTime=30 PriorityTier=10 PreemptMode=OFF
"""
SLURMDBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={here}/munge.sock
DbdHost=localhost
DbdPort={dbd}
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=unlabeled_slurm
PidFile={here}/slurmdbd.pid
LogFile={here}/log/slurmdbd.log
"""


class Impossible(Exception):
    """What this machine lacks."""


def up() -> None:
    """Starts it, or leaves it as it is if it runs."""
    _able()
    if _alive("slurmctld") and _waited(10, _ready):
        print(f"already up: export SLURM_CONF={CONF}")
        return
    down()
    shutil.rmtree(HERE, ignore_errors=True)
    for folder in ("etc", "log", "state", *NODES):
        (HERE / folder).mkdir(parents=True)
    _configure()
    _names(add=True)
    _munge()
    _accounting()
    _started("slurmctld", "-f", str(CONF))
    for node in NODES:
        _started("slurmd", "-N", node, "-f", str(CONF))
    if not _waited(60, _ready):
        raise Impossible(f"the nodes do not come up: {_said('sinfo', '-Nl')}\n{_logs()}")
    print(f"up: export SLURM_CONF={CONF}")


def down() -> None:
    """Stops what `up` started, and nothing else."""
    if not HERE.exists():
        return
    if _alive("slurmctld"):
        jobs = _said("squeue", "--noheader", "--format=%A").split()
        if jobs:
            subprocess.run(["scancel", *set(jobs)], env=ENV, check=False)
            _waited(30, lambda: not _said("squeue", "--noheader").strip())
    for name in (*(f"slurmd-{node}" for node in NODES), "slurmctld", "slurmdbd", "db", "munged"):
        _stop(HERE / f"{name}.pid")
    _names(add=False)
    shutil.rmtree(HERE / "database", ignore_errors=True)


def why_not() -> None:
    """Raises Impossible where it cannot run; installs packages to find out."""
    _able()


def _able() -> None:
    if os.geteuid() != 0:
        raise Impossible("SLURM can only be started by root")
    missing = [name for name in PROGRAMS if shutil.which(name, path=ENV["PATH"]) is None]
    if not missing:
        return
    if shutil.which("apt-get") is None:
        raise Impossible(f"no {', '.join(missing)}, and no apt-get to install them")
    refused = (
        Path(tempfile.gettempdir()) / "unlabeled-slurm-refused"
    )  # what cannot be installed now is not asked for
    if refused.exists() and time.time() - refused.stat().st_mtime < 600:
        raise Impossible(refused.read_text())
    env = {**ENV, "DEBIAN_FRONTEND": "noninteractive"}
    quiet = ["apt-get", "-q", "-o", "Acquire::Retries=0", "-o", "Acquire::http::Timeout=10"]
    install = [*quiet, "install", "-y", "--no-install-recommends", *PACKAGES]
    said = ""
    for command in (install, [*quiet, "update"], install):
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
        )
        said = done.stderr.strip() or said
        if command is install and done.returncode == 0:
            return
    reason = f"Debian's packages cannot be installed: {said.splitlines()[-1] if said else '?'}"
    refused.write_text(reason)
    raise Impossible(reason)


def _configure() -> None:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20 * 9 // 10
    host = socket.gethostname().split(".")[0]
    nodes = [
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={PORT + 2 + i} "
        f"CPUs={CPUS} RealMemory={memory}"
        for i, name in enumerate(NODES)
    ]
    words = {"here": HERE, "host": host, "port": PORT, "dbd": PORT + 1, "nodes": "\n".join(nodes)}
    CONF.write_text(SLURM_CONF.format(**words))
    (HERE / "etc/cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
    dbd = HERE / "etc/slurmdbd.conf"
    dbd.touch(0o600)
    dbd.write_text(SLURMDBD_CONF.format(**words))


def _munge() -> None:
    """An authentication of its own: key, socket and log in the folder."""
    key = HERE / "munge.key"
    key.touch(0o600)
    key.write_bytes(os.urandom(128))
    (HERE / "munge.seed").touch(0o600)
    _started(
        "munged",
        "--force",
        *("--key-file", str(key), "--socket", str(HERE / "munge.sock")),
        *("--pid-file", str(HERE / "munged.pid"), "--log-file", str(HERE / "log/munged.log")),
        *("--seed-file", str(HERE / "munge.seed")),
    )


def _accounting() -> None:
    """A database that nobody outside this machine reaches, and SLURM's daemon before it."""
    options = ["--no-defaults", "--user=root", f"--datadir={HERE / 'database'}"]
    options += ["--innodb-log-file-size=8M", "--innodb-flush-method=nosync"]
    _started(
        "mariadb-install-db", *options, "--skip-test-db", "--auth-root-authentication-method=socket"
    )
    with (HERE / "log/database.log").open("ab") as log:
        subprocess.Popen(
            [
                *("mariadbd", *options, f"--socket={HERE / 'db.sock'}", "--skip-networking"),
                *(f"--pid-file={HERE / 'db.pid'}", "--innodb-buffer-pool-size=32M"),
            ],
            env=ENV,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    if not _waited(60, (HERE / "db.sock").exists):
        raise Impossible(f"the database does not start\n{_logs()}")
    _started("slurmdbd")
    if not _waited(60, lambda: not subprocess.call(["sacctmgr", "-n", "list", "cluster"], **_mute)):
        raise Impossible(f"the accounting does not answer\n{_logs()}")
    _started("sacctmgr", "-i", "add", "cluster", "unlabeled")


_mute = {"env": ENV, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def _names(*, add: bool) -> None:
    """The nodes' names in /etc/hosts: processes of a job look each other up by them.

    In place, because the file may be a mount.
    """
    hosts = Path("/etc/hosts")
    lines = [line for line in hosts.read_text().splitlines() if not line.endswith(MARK)]
    if add:
        known = [*NODES, socket.gethostname().split(".")[0]]
        lines += [f"127.0.0.1 {name} {MARK}" for name in known if not _resolves(name)]
    hosts.write_text("\n".join(lines) + "\n")


def _resolves(name: str) -> bool:
    try:
        socket.gethostbyname(name)
    except OSError:
        return False
    return True


def _started(*command: str) -> None:
    done = subprocess.run(
        command, env=ENV, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise Impossible(f"{command[0]} does not start: {done.stderr.strip()}\n{_logs()}")


def _ready() -> bool:
    said = _said("sinfo", "--noheader", "-N", "-o", "%N", "-t", "idle,mix,alloc")
    return set(said.split()) >= set(NODES)


def _said(*command: str) -> str:
    return subprocess.run(command, env=ENV, capture_output=True, text=True, check=False).stdout


def _logs() -> str:
    last = [(p.name, p.read_text(errors="replace")[-400:]) for p in (HERE / "log").glob("*.log")]
    return "\n".join(f"{name}: {text}" for name, text in last)


def _waited(seconds: float, ready: Callable[[], object]) -> bool:
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def _pid(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _runs(pid: int) -> bool:
    """Whether a process runs, and is no zombie that nobody collected yet."""
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def _alive(name: str) -> bool:
    pid = _pid(HERE / f"{name}.pid")
    return pid is not None and _runs(pid)


def _stop(path: Path) -> None:
    pid = _pid(path)
    if pid is not None and _runs(pid) and str(HERE) in _environment(pid):
        os.kill(pid, signal.SIGTERM)
        if not _waited(20, lambda: not _runs(pid)):
            os.kill(pid, signal.SIGKILL)
    path.unlink(missing_ok=True)


def _environment(pid: int) -> str:
    """What a daemon was started with: an old pid may be another process's by now."""
    try:
        return Path(f"/proc/{pid}/environ").read_text(errors="replace")
    except OSError:
        return ""


def main() -> None:
    """The command line."""
    what = {"up": up, "down": down, "why-not": why_not}.get((sys.argv[1:] or [""])[0])
    if what is None:
        sys.exit(__doc__)
    try:
        what()
    except Impossible as reason:
        print(reason, file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
