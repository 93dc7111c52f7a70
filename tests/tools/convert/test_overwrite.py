"""--overwrite is killed while it removes files. It resumes, and no reader takes what is left for a model."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path

import pytest
from checkpoints import save_checkpoint, tree
from faults import mounted
from prepared import Prepared
from removals import IN_CHILD

from moetier.tiers.errors import DiskSpaceError, TargetError, TargetExistsError
from moetier.tiers.layout import PAGE, Bits
from moetier.tiers.store.folder import GROUP
from moetier.tools.convert.convert import convert
from moetier.tools.convert.target import SLACK_BYTES

KILLED = """
import json, shutil
from pathlib import Path
import moetier.tools.convert.conversion, transformers.models.mixtral.modeling_mixtral
from moetier.tiers.errors import TargetExistsError
from moetier.tools.convert.convert import convert
source, old, work, every = sys.argv[1:]

def converted(target, kill_at=None, overwrite=True):
    'Counts what is removed before anything is made.'
    def converting():
        try:
            convert(source, target, fast=True, overwrite=overwrite)
        except TargetExistsError as error:
            return 3 if '--overwrite' in error.fix else 4
        return 0
    return in_child(converting, kill_at, until='plan.json.partial')

def copy(name):
    return shutil.copytree(old, Path(work) / name)

_, steps = converted(copy('count'))
print(steps)
for step in range(1, steps + 1, int(every)):
    target = copy(str(step))
    died, _ = converted(target, step)
    plainly, _ = converted(shutil.copytree(target, Path(work) / f'{step}-plain'), overwrite=False)
    again, _ = converted(target)
    print(json.dumps([step, died, plainly, again]))
"""


@pytest.mark.parametrize(
    ("cut", "every"),
    [
        pytest.param(False, 4, id="some steps"),
        pytest.param(False, 1, id="every step", marks=pytest.mark.slow),
        pytest.param(True, 1, id="every step, cut", marks=pytest.mark.slow),
    ],
)
def test_a_removal_that_is_killed_is_gone_on_with(scripts: Prepared, tmp_path: Path, cut: bool, every: int) -> None:
    """The old directory is a whole one, or a conversion that was cut; it holds somebody's file too."""
    source = save_checkpoint(tmp_path / "src")
    convert(source, tmp_path / "new", fast=True)
    uncut = tree(tmp_path / "new") | {"notes.txt": b"mine"}
    old = tmp_path / "old"
    convert(source, old, bits=8, fast=True)
    (old / "notes.txt").write_text("mine")
    if cut:
        (manifest := old / "experts.zarr" / "zarr.json").unlink()
        plan = json.loads((tmp_path / "new" / "experts.zarr" / "zarr.json").read_bytes())["attributes"]["moetier"]
        manifest.with_name("plan.json").write_text(json.dumps(plan | {"digest": "", "model": "another"}))
    result = scripts.run(IN_CHILD + KILLED, source, old, tmp_path / "work", every)
    assert result.returncode == 0, result.stderr
    count, *lines = result.stdout.splitlines()
    assert int(count) > 8
    assert [json.loads(line)[0] for line in lines] == list(range(1, int(count) + 1, every))
    for step, died, plainly, again in map(json.loads, lines):
        assert (died, again) == (-9, 0), (step, result.stderr)
        assert tree(tmp_path / "work" / str(step)) == uncut, step
        # Until the store is empty it is something else's, and said to be replaceable.
        assert plainly in (0, 3), step
        if plainly == 0:
            assert tree(tmp_path / "work" / f"{step}-plain") == uncut, step


def test_a_store_without_plan_is_replaced_only_if_told_to(tmp_path: Path) -> None:
    """As a removal that was killed leaves it."""
    source = save_checkpoint(tmp_path / "src")
    convert(source, tmp_path / "dst", fast=True)
    uncut = tree(tmp_path / "dst")
    (tmp_path / "dst" / "experts.zarr" / "zarr.json").unlink()
    before = tree(tmp_path / "dst")
    with pytest.raises(TargetExistsError, match="its plan is missing") as caught:
        convert(source, tmp_path / "dst", fast=True)
    assert "--overwrite" in caught.value.fix
    assert tree(tmp_path / "dst") == before
    convert(source, tmp_path / "dst", fast=True, overwrite=True)
    assert tree(tmp_path / "dst") == uncut


def test_a_conversion_that_is_under_way_is_not_removed(tmp_path: Path) -> None:
    """Its lock says so, whoever's files one may look at."""
    source = save_checkpoint(tmp_path / "src")
    convert(source, tmp_path / "dst", bits=8, fast=True)
    before = tree(tmp_path / "dst")
    lock = os.open(tmp_path / "dst" / GROUP, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(TargetError, match="is in use: a conversion is writing into it"):
            convert(source, tmp_path / "dst", fast=True, overwrite=True)
    finally:
        os.close(lock)
    assert tree(tmp_path / "dst") == before


@pytest.mark.parametrize("bits", [4, 16])
def test_where_the_new_one_does_not_fit_the_old_one_stays(tmp_path: Path, bits: Bits) -> None:
    """What that takes is room for the new one, but for what has another name too. One of 16 bits is the very same."""
    source = save_checkpoint(tmp_path / "src")
    convert(source, tmp_path / "new", bits=16)
    new = tree(tmp_path / "new")
    convert(source, tmp_path / "old", bits=bits, fast=bits < 16)
    old = tree(tmp_path / "old")
    room = sum(-(-len(data) // PAGE) * PAGE for data in new.values()) + SLACK_BYTES
    with mounted("tmpfs", tmp_path / "disk", f"size={room + (1 << 16)}") as disk:
        dst = Path(shutil.copytree(tmp_path / "old", disk / "dst"))

        def is_refused() -> None:
            with pytest.raises(DiskSpaceError, match=r"are free once the old conversion is removed\.") as caught:
                convert(source, dst, bits=16, overwrite=True)
            assert str(dst) in caught.value.cause
            assert tree(dst) == old

        (disk / "ballast").write_bytes(bytes(1 << 18))
        is_refused()
        (disk / "ballast").unlink()
        (links := disk / "links").mkdir()
        for number, shard in enumerate((dst / GROUP).glob("*/c/*/0/0")):
            os.link(shard, links / str(number))
        is_refused()
        shutil.rmtree(links)
        convert(source, dst, bits=16, overwrite=True)
        assert tree(dst) == new
