from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import psutil
import pytest
from cgroups import memory_limit

from moetier.runtime.config import GROUP_SHARE, Size
from moetier.runtime.machine.memory import Available, available_memory, budget_for, whole_memory
from moetier.tiers.errors import BudgetError

GIB = 1 << 30
V1 = Path("/sys/fs/cgroup/memory")


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def fake_v2(root: Path, *, limit: str, current: int, inactive_file: int = 0, path: str = "/user.slice/job") -> Path:
    write(root / "proc/self", cgroup=f"0::{path}")
    top = root / "sys/fs/cgroup"
    write(top / path.lstrip("/"), memory__max=limit, memory__current=str(current))
    write(top / path.lstrip("/"), memory__stat=f"anon 5\ninactive_file {inactive_file}\nactive_file 0")
    return top


def test_without_groups_it_is_what_the_machine_has(tmp_path: Path) -> None:
    known = available_memory(tmp_path)
    assert known.limiter == "this machine"
    assert known.bytes == pytest.approx(psutil.virtual_memory().available, rel=0.2)


def test_version_2_counts_file_pages_as_free(tmp_path: Path) -> None:
    fake_v2(tmp_path, limit=str(1 << 20), current=900_000, inactive_file=500_000)
    assert available_memory(tmp_path) == Available(
        (1 << 20) - 400_000, "the control group /user.slice/job", GROUP_SHARE
    )


def test_version_2_without_a_limit(tmp_path: Path) -> None:
    fake_v2(tmp_path, limit="max", current=900_000)
    assert available_memory(tmp_path).limiter == "this machine"


def test_version_2_a_parent_limits_too(tmp_path: Path) -> None:
    top = fake_v2(tmp_path, limit="max", current=10)
    write(top / "user.slice", memory__max="4096", memory__current="1096", memory__stat="anon 1")
    assert available_memory(tmp_path).bytes == 3000
    assert whole_memory(tmp_path) == Available(4096, "the control group /user.slice/job", GROUP_SHARE)


def test_what_there_is_in_all_is_the_machines_where_no_group_has_a_limit(tmp_path: Path) -> None:
    machine = Available(psutil.virtual_memory().total, "this machine")
    assert whole_memory(tmp_path) == machine
    fake_v2(tmp_path, limit="max", current=900_000)
    assert whole_memory(tmp_path) == machine


def test_in_a_container_the_group_is_the_mounted_top(tmp_path: Path) -> None:
    write(tmp_path / "proc/self", cgroup="0::/../../elsewhere")
    write(tmp_path / "sys/fs/cgroup", memory__max="8192", memory__current="192", memory__stat="anon 1")
    assert available_memory(tmp_path).bytes == 8000


def test_version_1(tmp_path: Path) -> None:
    write(tmp_path / "proc/self", cgroup="9:name=systemd:/\n4:cpu,memory:/job\n0::/")
    write(tmp_path / "sys/fs/cgroup/memory/job", memory__limit_in_bytes="100000", memory__usage_in_bytes="60000")
    write(tmp_path / "sys/fs/cgroup/memory/job", memory__stat="inactive_file 1\ntotal_inactive_file 20000")
    assert available_memory(tmp_path).bytes == 60000


def test_version_1_for_real() -> None:
    """A child in a real group of 512 MiB sees that limit and not the machine's memory."""
    if not os.access(V1, os.W_OK):
        pytest.skip("no writable control group of version 1 for memory")
    group = V1 / f"moetier-test-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(512 << 20))
        code = "from moetier.runtime.machine.memory import available_memory as a; print(a().bytes, a().limiter)"
        enter = f'echo $$ > "{group}/cgroup.procs" && exec "{sys.executable}" -c "{code}"'
        output = subprocess.run(["/bin/sh", "-c", enter], capture_output=True, text=True, check=True).stdout
        count, limiter = output.split(maxsplit=1)
        assert 300 << 20 < int(count) < 512 << 20
        assert group.name in limiter
    finally:
        group.rmdir()


HERE = Available(8 * GIB, "this machine")


def most(left: int) -> int:
    """Of ``left`` bytes: a 64th, and 16 MiB, are the kernel's."""
    return left * 63 // 64 - (16 << 20)


def test_the_default_is_four_fifths_of_what_is_left() -> None:
    given = budget_for(None, smallest=GIB, largest=100 * GIB, reserve=GIB, available=HERE)
    assert given == int(most(7 * GIB) * 0.8)
    of_group = replace(HERE, share=GROUP_SHARE)
    assert budget_for(None, smallest=GIB, largest=100 * GIB, reserve=GIB, available=of_group) == int(
        most(7 * GIB) * 0.95
    )


def test_the_default_is_no_more_than_all_experts_and_no_less_than_the_smallest() -> None:
    assert budget_for(None, smallest=GIB, largest=2 * GIB, reserve=GIB, available=HERE) == 2 * GIB
    smallest = 13 * GIB // 2
    assert budget_for(None, smallest=smallest, largest=9 * GIB, reserve=GIB, available=HERE) == smallest


def test_what_was_asked_for_is_given() -> None:
    assert budget_for(Size(bytes=3 * GIB), smallest=GIB, largest=100 * GIB, reserve=0, available=HERE) == 3 * GIB
    assert budget_for(Size(bytes=3 * GIB), smallest=GIB, largest=2 * GIB, reserve=0, available=HERE) == 2 * GIB


def test_a_number_without_its_unit_is_asked_about() -> None:
    with pytest.raises(BudgetError) as caught:
        budget_for(Size.parse(4), smallest=GIB, largest=2 * GIB, reserve=0, available=HERE)
    assert caught.value.fix.startswith("Did you mean 4GiB? Give `ram` from ")


def test_a_share_is_of_what_is_left() -> None:
    for share in (Fraction(1, 4), Fraction(1)):
        given = budget_for(Size(share=share), smallest=GIB, largest=100 * GIB, reserve=GIB, available=HERE)
        assert given == int(share * most(7 * GIB))


def test_more_than_there_is_does_no_harm_where_all_experts_fit() -> None:
    assert budget_for(Size(bytes=100 * GIB), smallest=GIB, largest=2 * GIB, reserve=0, available=HERE) == 2 * GIB


@pytest.mark.parametrize(
    ("asked", "why"), [(GIB - 1, "too small"), (most(7 * GIB) + 1, "more than this machine leaves"), (8 * GIB, "more")]
)
def test_what_cannot_work_is_refused_with_what_would(asked: int, why: str) -> None:
    with pytest.raises(BudgetError, match=why) as caught:
        budget_for(Size(bytes=asked), smallest=GIB, largest=100 * GIB, reserve=GIB, available=HERE)
    smallest, largest = named(caught.value)
    assert (smallest, largest) == (GIB, most(7 * GIB))
    for works in (smallest, largest):
        assert budget_for(Size(bytes=works), smallest=GIB, largest=100 * GIB, reserve=GIB, available=HERE) == works


def test_a_refused_size_is_named_as_it_was_given() -> None:
    """And not as the part of it that all experts would take."""
    with pytest.raises(BudgetError, match=r"^`ram` of 60 GiB is more than this machine leaves for experts"):
        budget_for(Size.parse("60GiB"), smallest=GIB, largest=20 * GIB, reserve=0, available=HERE)


def named(error: BudgetError) -> list[int]:
    """Both ends, as the fix names them to the byte."""
    return [int(count) for count in re.findall(r"(\d+) bytes", error.fix)]


def test_the_largest_that_all_experts_take_is_named_where_they_fit() -> None:
    with pytest.raises(BudgetError) as caught:
        budget_for(Size(bytes=1), smallest=GIB, largest=2 * GIB, reserve=GIB, available=HERE)
    assert named(caught.value) == [GIB, 2 * GIB]


def test_a_machine_that_is_too_small_is_reported_to_be() -> None:
    with pytest.raises(BudgetError, match="this machine leaves"):
        budget_for(None, smallest=8 * GIB, largest=9 * GIB, reserve=GIB, available=HERE)


ALLOCATE = """
import re, sys
from moetier.runtime.config import Size
from moetier.runtime.machine.memory import available_memory, budget_for
from moetier.tiers.arena.arena import Arena
from moetier.tiers.errors import BudgetError
from moetier.tiers.arena.layout import ArenaLayout, Region
PAGE, RESERVE = 4096, int(sys.argv[1])
sizes = {"smallest": PAGE, "largest": 1 << 50, "reserve": RESERVE, "available": available_memory()}
try:
    budget_for(Size(bytes=1 << 50), **sizes)
except BudgetError as error:
    most = int(re.findall(r"(\\d+) bytes", error.fix)[-1])
size = most // PAGE * PAGE
arena = Arena.create(ArenaLayout("", (1,), (Region("records", 1, size),)))
memory = arena.slot(0)
for start in range(0, len(memory), PAGE):
    memory[start] = 1
reserve = bytearray(RESERVE)
for start in range(0, RESERVE, PAGE):
    reserve[start] = 1
print(most)
"""


@pytest.mark.slow
@pytest.mark.parametrize("reserve", [0, 200 << 20])
def test_the_largest_that_is_named_can_be_had_for_real(reserve: int) -> None:
    """Every page of it, and of the reserve, in a control group of 1 GiB that kills who takes more."""
    with memory_limit(GIB) as group:
        result = group.run([sys.executable, "-c", ALLOCATE, str(reserve)])
        assert result.returncode == 0, f"{result.returncode}: {result.stderr}"
        assert 700 << 20 < int(result.stdout) + reserve < GIB
