"""Ray clusters whose nodes all run on this machine, in a process of their own, and what runs in them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from openai import OpenAI
from readers import PATIENCE

KEY = "a-key-of-the-tests"
SCRIPT = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster()
memory = {"memory": int(sys.argv[1])} if sys.argv[1] != "None" else {}
for count in sys.argv[2:]:
    cluster.add_node(num_cpus=int(count), include_dashboard=False, object_store_memory=80 << 20, **memory)
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""
WAIT = """
import sys, time
from ray import serve
while True:
    application = serve.status().applications["moetier"]
    states = [dict(each.replica_states) for each in application.deployments.values()]
    assert application.status not in ("DEPLOY_FAILED", "UNHEALTHY"), application
    if application.status == "RUNNING" and states == [{"RUNNING": int(sys.argv[1])}]:
        break
    time.sleep(0.5)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class RayCluster:
    """A cluster with one node for each number of CPUs, each with ``memory`` bytes for actors (None: Ray's default)."""

    def __init__(self, cpus: Sequence[int], place: Path, memory: int | None = None) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="ray"))  # the paths of its sockets must be short
        (self._folder / "ray").mkdir()  # where the cluster writes its address
        self._log = place / "cluster.log"
        self.port = free_port()
        self.environment = os.environ | {
            "MOETIER_API_KEY": KEY,
            "XDG_RUNTIME_DIR": str(self._folder),
            "RAY_TMPDIR": str(self._folder),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_memory_monitor_refresh_ms": "0",  # other programs may fill the machine's memory
        }
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SCRIPT, str(memory), *map(str, cpus)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self.environment,
                cwd=place,
            )
        assert self.process.stdout is not None
        address = self.process.stdout.readline().decode().strip()
        assert address, self.log
        self.environment["RAY_ADDRESS"] = address

    @property
    def log(self) -> str:
        """Return the output of the cluster's commands and the logs of its processes."""
        logs = [self._log, *sorted(self._folder.glob("*/session_latest/logs/serve/*.log"))]
        return "\n".join(f"== {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in logs)

    def run(self, *words: str | Path, status: int = 0) -> str:
        """Runs Python with these words in the cluster's environment. What it printed; its errors if it is to fail."""
        command = [sys.executable, *map(str, words)]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=5 * PATIENCE)
        assert done.returncode == status, f"{done.stdout}{done.stderr}\n{self.log}"
        return done.stderr if status else done.stdout

    def deploy(self, directory: Path, *options: str, status: int = 0) -> str:
        words = ("-m", "moetier", "ray", directory, "--name", "small", "--port", str(self.port), *options)
        return self.run(*words, status=status)

    def deploy_file(self, directory: Path, replicas: int, **options: Any) -> None:
        """Deploy an application from a configuration file with ``options``, as `serve deploy` does."""
        application = {
            "name": "moetier",
            "route_prefix": "/",
            "import_path": "moetier.ray:app",
            "args": {"model": str(directory), "name": "small", **options},
            "deployments": [
                {"name": "moetier", "autoscaling_config": {"min_replicas": replicas, "max_replicas": replicas}}
            ],
        }
        config = {"http_options": {"host": "127.0.0.1", "port": self.port}, "applications": [application]}
        file = self._folder / "config.yaml"
        file.write_text(json.dumps(config))
        self.run("-c", "from ray.serve.scripts import cli; cli()", "run", "--non-blocking", file)
        self.wait_for(replicas)

    def shut_down(self) -> None:
        """End Ray Serve, as `serve shutdown` does."""
        self.run("-c", "import ray.serve; ray.serve.shutdown()")

    def wait_for(self, replicas: int) -> None:
        """Until the application runs with so many replicas."""
        self.run("-c", WAIT, str(replicas))

    def client(self, **options: Any) -> OpenAI:
        given = {"base_url": f"http://127.0.0.1:{self.port}/v1", "api_key": KEY, "max_retries": 0, "timeout": PATIENCE}
        return OpenAI(**given | options)

    def processes(self, pattern: str) -> list[int]:
        """Those of the cluster whose command line or title matches, in the order of their ids."""
        return [pid for pid in sorted(_tree(self.process.pid)) if re.search(pattern, _title(pid))]

    @property
    def replicas(self) -> list[int]:
        return self.processes(r"^ray::ServeReplica:")

    @property
    def daemons(self) -> list[int]:
        return self.processes(r" daemon .*--ready-fd")

    def parent_of(self, pid: int) -> int:
        return _parents()[pid]

    def folder_of(self, pid: int) -> str:
        """The folder of the daemon ``pid``."""
        return _title(pid).split("--folder ")[1].split()[0]

    def ram_of(self, pid: int) -> int:
        """The last --ram of the daemon ``pid``, in bytes."""
        return int(re.findall(r"--ram=(\d+)", _title(pid))[-1])

    def stats(self, pid: int) -> dict[str, Any]:
        """Counters of the only model of the daemon ``pid``."""
        (counters,) = json.loads(self.run("-m", "moetier", "stats", self.folder_of(pid), "--json"))["models"]
        assert isinstance(counters, dict)
        return counters

    def end(self) -> None:
        tree = _tree(self.process.pid)
        assert self.process.stdin is not None
        self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(PATIENCE)
        for pid in tree:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        self.process.wait(PATIENCE)
        assert self.process.stdout is not None
        self.process.stdout.close()
        shutil.rmtree(self._folder, ignore_errors=True)


@contextlib.contextmanager
def ray_cluster(cpus: Sequence[int], place: Path, memory: int | None = None) -> Iterator[RayCluster]:
    cluster = RayCluster(cpus, place, memory)
    try:
        yield cluster
    finally:
        cluster.end()


def arena_bytes(pid: int, field: str) -> int:
    """``Pss`` or ``Size`` of the arenas that a process has mapped."""
    nbytes, is_arena = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            is_arena = "/memfd:moetier-arena" in line
        elif is_arena and line.startswith(f"{field}:"):
            nbytes += 1024 * int(line.split()[1])
    return nbytes


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _tree(root: int) -> set[int]:
    """A process and all that descend from it."""
    parents = _parents()
    processes, more = set(), {root}
    while more:
        processes |= more
        more = {pid for pid, parent in parents.items() if parent in more} - processes
    return processes


def _parents() -> dict[int, int]:
    """Return the parent's number for the number of each process on this machine."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    return parents


def _title(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""
