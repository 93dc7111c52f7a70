"""Number of threads: quotas of control groups, cpusets, affinity, options, and OpenMP's spinning."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cgroups import FREE, group_below, run_in, version_2, write
from places import TESTS
from prepared import Prepared

from moetier.runtime.config import TierConfig
from moetier.runtime.machine.threads import usable_cpus
from moetier.tiers.errors import ConfigError
from moetier.tools.cli.parser import walk
from moetier.tools.main import build_parser, main

CPU, CPUSET = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup/cpuset")
several = pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one CPU")


@pytest.fixture
def many_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a large host."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))


@pytest.mark.usefixtures("many_cpus")
@pytest.mark.parametrize(
    ("quota", "cpus"),
    [
        ("max 100000", 64),
        ("200000 100000", 2),
        ("100000 50000", 2),
        ("6400000 100000", 64),
        ("9900000 100000", 64),
        ("120000 100000", 1),
        ("150000 100000", 2),
        ("240000 100000", 2),
        ("20000 100000", 1),
        ("nonsense", 64),
        ("", 64),
    ],
)
def test_version_2_to_the_nearest_whole_number(tmp_path: Path, quota: str, cpus: int) -> None:
    assert usable_cpus(version_2(tmp_path, at_2=quota)) == cpus


@pytest.mark.usefixtures("many_cpus")
def test_version_2_the_least_of_the_groups_above(tmp_path: Path) -> None:
    assert usable_cpus(version_2(tmp_path, at_1="300000 100000", at_2="800000 100000")) == 3


@pytest.mark.usefixtures("many_cpus")
def test_version_2_in_a_container_the_group_is_the_mounted_top(tmp_path: Path) -> None:
    write(tmp_path, "", cpu__max="200000 100000")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/system.slice/docker-1.scope\n")
    assert usable_cpus(tmp_path) == 2


@pytest.mark.usefixtures("many_cpus")
@pytest.mark.parametrize("mounted", ["cpu", "cpu,cpuacct"])
def test_version_1(tmp_path: Path, mounted: str) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("4:cpu,cpuacct:/job/own\n3:cpuset:/\n0::/\n")
    write(tmp_path, f"{mounted}/job", cpu__cfs_quota_us="400000", cpu__cfs_period_us="100000")
    write(tmp_path, f"{mounted}/job/own", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    assert usable_cpus(tmp_path) == 4


@pytest.mark.usefixtures("many_cpus")
def test_without_groups_it_is_the_affinity(tmp_path: Path) -> None:
    assert usable_cpus(tmp_path) == 64


@several
@pytest.mark.slow  # a process imports torch and loads a model
def test_a_quota_of_version_1_for_real(tinymix_4bit: Path) -> None:
    """The quota is the outer group's, the process in the inner one. torch itself begins a thread for each CPU."""
    code = """
import os, sys, torch, moetier
sys.modules["hqq"] = None  # transformers would import it, and with it torch's compiler
from moetier.runtime.machine.threads import use_threads
print(torch.get_num_threads())
os.environ["OMP_NUM_THREADS"] = "2"  # as a user who asks for them
print(use_threads())
del os.environ["OMP_NUM_THREADS"]
moetier.load(sys.argv[1], daemon=None)[0].tiers.close()
print(torch.get_num_threads())
moetier.load(sys.argv[1], daemon=None, threads=2)[0].tiers.close()
print(torch.get_num_threads())
from moetier.tools.doctor.machine import processor
print(*(each.found for each in processor()))
"""
    with group_below(CPU, cpu__cfs_period_us="100000", cpu__cfs_quota_us="100000") as group:
        *threads, doctor = run_in(group, code, tinymix_4bit)
    assert threads == [str(len(os.sched_getaffinity(0))), "2", "1", "2"]
    assert doctor.endswith("cores, of which a control group's quota allows 1")


@several
def test_a_cpuset_for_real() -> None:
    with group_below(CPUSET, cpuset__cpus="0", cpuset__mems="0") as group:
        for name in ("cpuset.cpus", "cpuset.mems"):
            (group / name).write_text("0")
        assert run_in(group, "from moetier.runtime.machine.threads import usable_cpus; print(usable_cpus())") == ["1"]


@several
def test_affinity_for_real() -> None:
    code = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
    code += "from moetier.runtime.machine.threads import usable_cpus; print(usable_cpus())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1\n"


@pytest.mark.parametrize("threads", [0, -1, (os.cpu_count() or 1) + 1, True, 1.0, "1"])
def test_a_number_that_cannot_be(threads: object) -> None:
    with pytest.raises(ConfigError, match="`threads` is") as caught:
        TierConfig.of(threads=threads)  # type: ignore[arg-type]
    assert f"1 to {(os.cpu_count() or 1)}, the CPUs of this machine." in caught.value.fix


@pytest.mark.parametrize("threads", ["0", "-1", str((os.cpu_count() or 1) + 1), "many"])
def test_a_number_that_cannot_be_on_a_command_line(threads: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["generate", "nothing", f"--threads={threads}"])
    assert caught.value.code == 2
    assert "--threads" in capsys.readouterr().err


def test_commands_that_compute_have_the_option() -> None:
    without = {
        *("list", "rm", "verify", "inspect", "link", "mirror", "push", "replay", "plot"),
        *("daemon", "ps", "stats", "top", "bench", "bench disk"),
        *("doctor", "launch", "config", "config show", "cache", "cache list", "cache clear", "completion", "demo", ""),
    }
    found = {" ".join(path) for path, parser in walk(build_parser()) if not _has_threads(parser)}
    assert found == without


def _has_threads(parser: argparse.ArgumentParser) -> bool:
    return "--threads" in parser._option_string_actions


COMMANDS = {
    "generate": ["generate", "STORE", "x", "--max-new-tokens", "1", "--daemon", "none"],
    "convert": ["convert", "SOURCE", "TARGET", "--fast"],
}


@several
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_computes_with_so_many(
    command: str, scripts: Prepared, tinymix: Path, tinymix_4bit: Path, tmp_path: Path
) -> None:
    places = {"STORE": tinymix_4bit, "SOURCE": tinymix, "TARGET": tmp_path / "dst"}
    words = [places.get(word, word) for word in COMMANDS[command]]
    code = "import sys, torch; from moetier.tools.main import main; code = main(); print(torch.get_num_threads(), code)"
    result = scripts.run(code, *words, "--threads", 2)
    assert result.stdout.split()[-2:] == ["2", "0"], result.stderr
    if command == "convert":
        assert "2 workers" in result.stderr


@pytest.mark.parametrize(
    ("variables", "expected"),
    [({}, "2000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "active"}, None)],
    ids=["nothing", "a count", "a policy"],
)
def test_openmp_spins_for_a_bounded_time_unless_the_user_says_otherwise(
    variables: dict[str, str], expected: str | None
) -> None:
    """OpenMP itself says what it has taken from the environment, when it is loaded."""
    code = (
        "import ctypes, glob, importlib.util, os, moetier, sys; assert 'torch' not in sys.modules\n"
        "where = os.path.dirname(importlib.util.find_spec('torch').origin)\n"
        "ctypes.CDLL(glob.glob(where + '/lib/libgomp*.so*')[0])"
    )
    if not list(Path(_torch_folder()).glob("lib/libgomp*.so*")):
        pytest.skip("torch has another OpenMP")
    environment = FREE | {"OMP_DISPLAY_ENV": "verbose"} | variables
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    found = [line.split("'")[1] for line in said.stderr.splitlines() if "GOMP_SPINCOUNT" in line]
    assert len(found) == 1, said.stderr
    if expected is not None:
        assert found == [expected]
    else:
        assert int(found[0]) > 1_000_000


def test_another_engine_runs_as_its_own_users_have_it() -> None:
    """Also in a child of a process that has imported moetier."""
    names = "('GOMP_SPINCOUNT', 'ONEDNN_PRIMITIVE_CACHE_CAPACITY', 'LRU_CACHE_CAPACITY')"
    show = (
        f"import os, sys, moetier; sys.path.append({str(TESTS / 'measurements')!r})\n"
        f"from own_variables import remove_own_variables; print(*(os.environ.get(name) for name in {names}))\n"
    )
    code = show + "remove_own_variables()\n" + show
    parent = "import moetier, subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]], check=True)"
    for variables, expected in (
        ({}, ["2000 32 32", "None None None"]),
        ({"GOMP_SPINCOUNT": "5", "LRU_CACHE_CAPACITY": "6"}, ["5 32 6", "5 None 6"]),
    ):
        for words in (["-c", code], ["-c", parent, code]):
            done = subprocess.run([sys.executable, *words], env=FREE | variables, stdout=subprocess.PIPE, check=True)
            assert done.stdout.decode().splitlines() == expected


def _torch_folder() -> Path:
    import torch

    return Path(torch.__file__).parent


def test_the_number_is_what_it_was_if_the_work_fails() -> None:
    import torch

    from moetier.runtime.machine.threads import threads_for

    before = torch.get_num_threads()

    def fail() -> None:
        with threads_for(before + 3):
            assert torch.get_num_threads() == before + 3
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    assert torch.get_num_threads() == before
    with threads_for(before + 3):
        pass
    assert torch.get_num_threads() == before + 3
