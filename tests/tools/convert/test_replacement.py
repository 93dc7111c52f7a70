"""--overwrite and --replace-first: killed at any step, without room, and with a source that can't be converted."""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import shutil
import stat
import tempfile
from pathlib import Path

import pytest
import torch
from checkpoints import edit_json, edit_tensors, save_checkpoint, tree
from comparison import smallest_ram
from faults import mounted
from prepared import Prepared
from removals import IN_CHILD
from users import NOBODY, as_nobody, need_root

import moetier
from moetier.tiers.errors import CheckpointError, DiskSpaceError, StoreFormatError, TargetError, TargetExistsError
from moetier.tiers.layout import PAGE_BYTES, Bits, ExpertKey
from moetier.tiers.store.folder import GROUP, JOURNAL, MIRRORS, REPLACED, replacement_folder
from moetier.tiers.store.mirror import read_mirrors
from moetier.tiers.store.reader import ShardStore
from moetier.tiers.store.trunk import check_trunk
from moetier.tools.convert import replacement
from moetier.tools.convert.api import convert
from moetier.tools.convert.mirror_writer import make_mirror
from moetier.tools.convert.replacement import check_replaceable
from moetier.tools.convert.target import SLACK_BYTES

REPLACING = """
import json, os, shutil, signal, sys
from pathlib import Path
import moetier.tools.convert.conversion, transformers.models.mixtral.modeling_mixtral
from moetier.tools.convert.api import convert
source, old, work, chosen = sys.argv[1:]
CHANGES = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate")

def replaced(folder, kill_at=None):
    'Exit status, and what was changed below the folder; killed before the change of a number.'
    receive, send = os.pipe()
    if not (pid := os.fork()):
        os.close(receive)
        changes = []
        def hook(event, arguments):
            writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if (writes or event in CHANGES) and any(str(each).startswith(str(folder)) for each in arguments):
                changes.append(f"{event} {arguments[:2]}")
                if len(changes) == kill_at: os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        convert(source, folder / "dst", fast=True, overwrite=True)
        with open(send, "w") as stream: json.dump(changes, stream)
        os._exit(0)
    os.close(send)
    with open(receive) as stream: said = stream.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), json.loads(said) if said else None

def fresh(name):
    shutil.copytree(old, (folder := Path(work, str(name))) / "dst")
    return folder

_, changes = replaced(fresh("count"))
first = next(number for number, change in enumerate(changes, 1) if "replaced~" in change)
steps = [*eval(chosen, {"first": first, "last": len(changes)})]
print(json.dumps([first, steps]))
for step in steps:
    died, _ = replaced(folder := fresh(step), step)
    shutil.copytree(folder, f"{folder}-killed")
    again, _ = replaced(folder)
    print(json.dumps([step, died, again]))
"""


# the kernel then refuses renameat2, as some file systems do; Python's own renames are other system calls
WITHOUT_EXCHANGE = """
import ctypes, platform, struct
number = {"x86_64": 316, "aarch64": 276}[platform.machine()]
rules = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x50000 | 22), (0x06, 0, 0, 0x7FFF0000)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
class Filter(ctypes.Structure): _fields_ = [("length", ctypes.c_ushort), ("rules", ctypes.c_void_p)]
libc = ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
assert libc.prctl(22, 2, ctypes.byref(Filter(len(rules), ctypes.addressof(code))), 0, 0) == 0  # PR_SET_SECCOMP
"""


def opened(folder: Path) -> str:
    """The digest of a model directory, all of which is read: experts, trunk and config."""
    with ShardStore.open(folder) as store:
        check_trunk(folder, store.manifest)
        bits = json.loads((folder / "config.json").read_bytes())["quantization_config"]["bits"]
        assert bits == store.manifest.bits
        for block, entry in enumerate(store.manifest.blocks):
            slot = memoryview(mmap.mmap(-1, store.layout(block).slot_bytes))
            for expert in range(entry.experts):
                store.read_into(ExpertKey(block, expert), slot)
        return store.manifest.digest


def check_killed(tmp_path: Path, lines: list[tuple[int, int, int]]) -> None:
    """The old directory, of 8 bits, held a user's file too."""
    old, new = opened(tmp_path / "old"), opened(tmp_path / "new")
    found = []
    for step, died, again in lines:
        assert (died, again) == (-9, 0), step
        if (killed := tmp_path / "work" / f"{step}-killed" / "dst").exists():
            found.append(opened(killed))
        assert {path.name for path in (tmp_path / "work" / str(step)).iterdir()} == {"dst"}, step
        assert tree(tmp_path / "work" / str(step) / "dst") == tree(tmp_path / "new") | {"notes/a.txt": b"mine"}, step
    assert {*found} == {old, new}
    assert found == sorted(found, key=lambda digest: digest == new), "once the new one is in place, it stays there"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, a model of 8 bits, with a user's file, and one of 4."""
    folder = tmp_path_factory.mktemp("made")
    source = save_checkpoint(folder / "src")
    convert(source, folder / "new", fast=True)
    convert(source, folder / "old", bits=8, fast=True)
    (folder / "old" / "notes").mkdir()
    (folder / "old" / "notes" / "a.txt").write_text("mine")
    return folder


@pytest.fixture
def both(made: Path, tmp_path: Path) -> Path:
    """A checkpoint; beside it are a model of 8 bits, with a user's file, and one of 4. They may be changed."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path / "src"


# steps before which a replacement is killed: ``first`` is the one that makes the folder of the old model
EVERY_STEP = pytest.param("range(1, last + 1)", id="every step", marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "chosen",
    [EVERY_STEP, pytest.param("[*range(20, first, 20), *range(first + 1, last + 1, 3)]", id="some steps")],
)
def test_a_replacement_that_is_killed_leaves_the_old_or_the_new_one(
    scripts: Prepared, both: Path, tmp_path: Path, chosen: str
) -> None:
    result = scripts.run(REPLACING, both, tmp_path / "old", tmp_path / "work", chosen)
    assert result.returncode == 0, result.stderr
    (first, steps), *lines = map(json.loads, result.stdout.splitlines())
    assert first > 20
    assert len(steps) >= 7
    assert [step for step, _, _ in lines] == steps
    assert all((tmp_path / "work" / f"{step}-killed" / "dst").exists() for step in steps)
    check_killed(tmp_path, lines)


@pytest.mark.parametrize("chosen", [EVERY_STEP, pytest.param("range(first + 1, first + 4)", id="the renames")])
def test_where_names_cannot_be_exchanged_it_goes_on_too(
    scripts: Prepared, both: Path, tmp_path: Path, chosen: str
) -> None:
    """Killed between two renames it leaves no model in its place, but both beside it."""
    result = scripts.run(WITHOUT_EXCHANGE + REPLACING, both, tmp_path / "old", tmp_path / "work", chosen)
    assert result.returncode == 0, result.stderr
    (_, steps), *lines = map(json.loads, result.stdout.splitlines())
    (gone,) = [path for step in steps if not (path := tmp_path / "work" / f"{step}-killed" / "dst").exists()]
    with pytest.raises(StoreFormatError, match="its replacement was interrupted") as caught:
        ShardStore.open(gone)
    assert caught.value.fix == f"Put the new model in its place: mv '{gone}~new' {gone}"
    check_killed(tmp_path, lines)


def spoil(tensors: dict[str, torch.Tensor]) -> None:
    """Make a weight of the last block a NaN."""
    last = max(name for name in tensors if ".experts." in name)
    tensors[last].view(-1)[-1] = torch.nan


def test_a_source_that_cannot_be_converted_leaves_the_old_one(tmp_path: Path) -> None:
    """Its last block has a NaN. What was begun does not stay when another source is converted."""
    source = save_checkpoint(tmp_path / "src", shards=1)
    convert(source, tmp_path / "dst", bits=8, fast=True)
    old = tree(tmp_path / "dst")
    broken = Path(shutil.copytree(source, tmp_path / "broken" / "src"))
    edit_tensors(broken, spoil)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="are not finite numbers"):
            convert(broken, tmp_path / "dst", fast=True, overwrite=True)
        assert tree(tmp_path / "dst") == old
    begun = tree(replacement_folder(tmp_path / "dst"))
    assert any("/c/0/0/0" in name for name in begun), "the first block is complete"
    assert convert(source, tmp_path / "dst", bits=8, fast=True).was_complete
    assert not convert(source, tmp_path / "dst", fast=True, overwrite=True).resumed_blocks
    convert(source, tmp_path / "new", fast=True)
    assert tree(tmp_path / "dst") == tree(tmp_path / "new")
    assert not replacement_folder(tmp_path / "dst").exists()


def test_a_file_whose_name_is_taken_is_set_aside(both: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A process died after the exchange. Then files were made that have the names of files of the old model."""
    dst = Path(shutil.copytree(tmp_path / "new", tmp_path / "dst"))
    (dst / JOURNAL).write_text("{}")
    (tmp_path / "old" / "plans").mkdir()
    (tmp_path / "old" / "plans" / "b.txt").write_text("mine too")
    (tmp_path / "old").rename(dst / REPLACED)
    (dst / "notes").mkdir()
    (dst / "notes" / "a.txt").write_text("later")
    (dst / "plans").write_text("later too")
    kept = {"notes/a.txt": b"later", "notes/a.txt.old": b"mine", "plans": b"later too", "plans.old/b.txt": b"mine too"}
    convert(both, dst, fast=True, overwrite=True, quiet=False)
    said = capfd.readouterr().err
    assert tree(dst) == tree(tmp_path / "new") | kept
    assert f"{dst / 'notes' / 'a.txt.old'}: a file of the old model" in said
    assert f"{dst / 'plans.old' / 'b.txt'}: a file of the old model" in said
    assert not convert(both, dst, fast=True, overwrite=True).was_complete
    assert tree(dst) == tree(tmp_path / "new") | kept


@pytest.mark.parametrize("option", ["overwrite", "replace_first"])
def test_a_tokenizer_that_was_copied_by_hand_stays(
    both: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], option: str
) -> None:
    """The checkpoint has none. A model of another checkpoint does not use it."""
    dst, how = tmp_path / "old", {option: True, "fast": True}
    (dst / "notes" / "a.txt").unlink()
    (dst / "tokenizer.json").write_text("{}")
    convert(both, dst, **how)
    assert tree(dst) == tree(tmp_path / "new") | {"tokenizer.json": b"{}"}
    other = Path(shutil.copytree(both, tmp_path / "other"))
    edit_json(other / "config.json", rms_norm_eps=1e-4)
    convert(other, tmp_path / "of other", fast=True)
    convert(other, dst, quiet=False, **how)
    assert f"{dst / 'tokenizer.json.old'}: a file of the old model" in capfd.readouterr().err
    assert tree(dst) == tree(tmp_path / "of other") | {"tokenizer.json.old": b"{}"}


def test_the_folders_keep_their_modes_and_owners(tmp_path: Path) -> None:
    """The folder beside the model has them from the beginning: others may not read a private one."""
    source = save_checkpoint(tmp_path / "src", shards=1)
    broken = Path(shutil.copytree(source, tmp_path / "broken" / "src"))
    edit_tensors(broken, spoil)
    convert(source, dst := tmp_path / "dst", bits=8, fast=True)

    def access(folder: Path) -> list[tuple[int, int, int]]:
        found = [path.stat() for path in (folder, folder / GROUP)]
        return [(stat.S_IMODE(each.st_mode), each.st_uid, each.st_gid) for each in found]

    if os.geteuid() == 0:
        os.chown(dst, 1234, 1235)
        os.chown(dst / GROUP, 1236, 1237)
    dst.chmod(0o2710)
    (dst / GROUP).chmod(0o700)
    before = access(dst)
    with pytest.raises(CheckpointError, match="are not finite numbers"):
        convert(broken, dst, fast=True, overwrite=True)
    assert access(replacement_folder(dst)) == before
    convert(source, dst, fast=True, overwrite=True)
    assert access(dst) == before


def test_one_that_cannot_be_written_is_refused_before() -> None:
    """Its own user has made it so. When it is exchanged, it is too late to say so."""
    need_root()
    with tempfile.TemporaryDirectory() as parent:  # another user can't enter pytest's own
        Path(parent).chmod(0o777)
        (folder := Path(parent, "model")).mkdir()
        (folder / GROUP).mkdir()
        folder.chmod(0o555)
        os.chown(folder, NOBODY, NOBODY)
        said = as_nobody(lambda: check_replaceable(folder))
        assert said == f"TargetError: {folder} can't be written, so it can't be replaced. Run: chmod u+wx {folder}"


def test_the_current_folder_is_not_replaced(both: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name would be that of the new model, while relative paths lead to the old one."""
    monkeypatch.chdir(tmp_path / "old" / "notes")
    before = tree(tmp_path)
    for dst in (Path(".."), tmp_path / "old"):
        with pytest.raises(TargetError, match="The current folder is"):
            convert(both, dst, fast=True, overwrite=True)
    assert tree(tmp_path) == before


def test_a_link_is_not_given_away(both: Path, tmp_path: Path) -> None:
    """Someone else may have put it beside the model."""
    (elsewhere := tmp_path / "elsewhere").mkdir()
    elsewhere.chmod(0o711)
    replacement_folder(tmp_path / "old").symlink_to(elsewhere)
    (tmp_path / "old").chmod(0o777)
    with pytest.raises(TargetError, match="can't be written"):
        convert(both, tmp_path / "old", fast=True, overwrite=True)
    assert (stat.S_IMODE(elsewhere.stat().st_mode), tree(elsewhere)) == (0o711, {})


def test_a_model_that_is_loaded_goes_on(both: Path, tmp_path: Path) -> None:
    """Its experts do not fit into its memory, so it still reads the old ones."""
    tokens = torch.tensor([[5, 6, 7, 8]])
    model, _ = moetier.load(tmp_path / "old", daemon=None, ram=smallest_ram(tmp_path / "old"))
    with model.tiers, torch.inference_mode():
        before = model(tokens).logits
        convert(both, tmp_path / "old", fast=True, overwrite=True)
        misses = model.tiers.snapshot()["host"]["misses"]
        assert torch.equal(model(tokens).logits, before)
        assert model.tiers.snapshot()["host"]["misses"] > misses
    assert opened(tmp_path / "old") == opened(tmp_path / "new")


def test_a_model_that_is_mounted_stays_until_it_is_not(both: Path, tmp_path: Path) -> None:
    """Its name can't be exchanged. The new model is complete, and is not made again."""
    old, before = tmp_path / "old", tree(tmp_path / "old")
    with mounted("none", old, "bind", source=old):
        with pytest.raises(TargetError, match=r"can't take the place of .* busy") as caught:
            convert(both, old, fast=True, overwrite=True)
        assert tree(old) == before
    assert str(replacement_folder(old)) in caught.value.cause
    assert convert(both, old, fast=True, overwrite=True).resumed_blocks == 3
    assert tree(old) == tree(tmp_path / "new") | {"notes/a.txt": b"mine"}
    assert not replacement_folder(old).exists()


def test_a_file_system_that_cannot_exchange_names_renames_both(
    both: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replacement, "exchange", lambda *_: False)
    convert(both, tmp_path / "old", fast=True, overwrite=True)
    assert tree(tmp_path / "old") == tree(tmp_path / "new") | {"notes/a.txt": b"mine"}
    assert not replacement_folder(tmp_path / "old").exists()


def test_a_replacement_that_left_no_model_in_place_is_finished(both: Path, tmp_path: Path) -> None:
    """A process died between two renames. It is not known of which checkpoint the old model was."""
    dst, beside = tmp_path / "dst", tmp_path / "dst~new"
    shutil.copytree(tmp_path / "new", beside)
    (beside / JOURNAL).write_text("{}")
    (tmp_path / "old" / "tokenizer.json").write_text("{}")
    (tmp_path / "old" / GROUP / "zarr.json").write_text("{")
    (tmp_path / "old").rename(beside / REPLACED)
    convert(both, dst, fast=True)
    assert tree(dst) == tree(tmp_path / "new") | {"notes/a.txt": b"mine", "tokenizer.json.old": b"{}"}
    assert not beside.exists()


def test_a_list_of_mirrors_that_is_malformed_goes_with_the_old_model(both: Path, tmp_path: Path) -> None:
    (tmp_path / "old" / MIRRORS).write_text("{")
    convert(both, tmp_path / "old", fast=True, overwrite=True)
    assert tree(tmp_path / "old") == tree(tmp_path / "new") | {"notes/a.txt": b"mine"}


def test_a_users_folder_beside_it_is_not_touched(both: Path, tmp_path: Path) -> None:
    (beside := replacement_folder(tmp_path / "old")).mkdir()
    (beside / "mine.txt").write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(TargetExistsError, match="old~new"):
        convert(both, tmp_path / "old", fast=True, overwrite=True)
    assert tree(tmp_path) == before


def test_another_model_beside_it_is_not_touched(both: Path, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "new", replacement_folder(tmp_path / "old"))
    before = tree(tmp_path)
    with pytest.raises(TargetExistsError, match=r"old~new holds another model, but what is to replace "):
        convert(both, tmp_path / "old", fast=True, overwrite=True)
    assert tree(tmp_path) == before


def test_through_a_link_the_model_is_replaced_and_not_the_link(both: Path, tmp_path: Path) -> None:
    (link := tmp_path / "link").symlink_to(tmp_path / "old")
    convert(both, link, fast=True, overwrite=True)
    assert link.is_symlink()
    assert opened(tmp_path / "old") == opened(tmp_path / "new")


def test_what_cannot_be_exchanged_is_reported_before(both: Path, tmp_path: Path) -> None:
    """The root of a file system, and a store that is a link to another disk."""
    shutil.move(tmp_path / "old" / GROUP, tmp_path / "store")
    (tmp_path / "old" / GROUP).symlink_to(tmp_path / "store")
    with mounted("tmpfs", tmp_path / "disk", "size=64m") as disk:
        shutil.copytree(tmp_path / "new", disk, dirs_exist_ok=True)
        for folder, bits, said in ((disk, 8, "is the root of a file system"), (tmp_path / "old", 4, "is a link")):
            before = tree(folder)
            with pytest.raises(TargetError, match=said) as caught:
                convert(both, folder, bits=bits, fast=True, overwrite=True)
            assert "--replace-first" in caught.value.fix
            assert tree(folder) == before
            convert(both, folder, bits=bits, fast=True, replace_first=True)
            with ShardStore.open(folder) as store:
                assert store.manifest.bits == bits
    assert (tmp_path / "old" / GROUP).is_symlink()


def test_mirrors_stay_with_their_records(both: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A model that is made again keeps its mirror. That of another model is named, or replaced if it is asked for."""
    dst, mirror = tmp_path / "old", tmp_path / "mirror"
    make_mirror(dst, mirror)
    old = tree(mirror)
    convert(both, dst, bits=8, fast=True, overwrite=True, quiet=False)
    assert read_mirrors(dst) == [mirror]
    assert "mirror of the old model" not in capfd.readouterr().err
    convert(both, dst, fast=True, overwrite=True, quiet=False)
    assert f"{mirror}: mirror of the old model, which is not removed\n" in capfd.readouterr().err
    assert (read_mirrors(dst), tree(mirror)) == ([], old)
    with pytest.raises(TargetExistsError, match="another model"):
        convert(both, dst, fast=True, mirror=mirror)
    convert(both, dst, fast=True, mirror=mirror, overwrite=True)
    assert read_mirrors(dst) == [mirror]
    with ShardStore.open(mirror) as store:
        assert store.manifest.digest == opened(dst)
    before = tree(tmp_path / "new")
    capfd.readouterr()
    convert(both, dst, bits=8, fast=True, replace_first=True, quiet=False)
    assert f"{mirror}: mirror of the old model, which is not removed\n" in capfd.readouterr().err
    with pytest.raises(TargetExistsError, match="another model"):  # a whole model, and not only a mirror
        convert(both, dst, bits=8, fast=True, mirror=tmp_path / "new", overwrite=True)
    assert tree(tmp_path / "new") == before


def test_an_unfinished_conversion_is_not_taken_for_a_mirror(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "src", shards=1)
    broken = Path(shutil.copytree(source, tmp_path / "broken" / "src"))
    edit_tensors(broken, spoil)
    with pytest.raises(CheckpointError, match="are not finite numbers"):
        convert(broken, tmp_path / "begun", bits=8, fast=True)
    before = tree(tmp_path / "begun")
    assert any("/c/0/0/0" in name for name in before), "the first block is complete"
    with pytest.raises(TargetExistsError):
        convert(source, tmp_path / "dst", fast=True, mirror=tmp_path / "begun", overwrite=True)
    assert tree(tmp_path / "begun") == before


def test_a_mirror_is_replaced_only_if_the_new_one_fits(both: Path, tmp_path: Path) -> None:
    """The room of the old one counts, and it is removed only then."""
    convert(both, tmp_path / "large", bits=16)
    with mounted("tmpfs", tmp_path / "disk", "size=64m") as disk:
        mirror = disk / "mirror"
        make_mirror(tmp_path / "old", mirror)
        before = tree(mirror)
        free = shutil.disk_usage(disk).free
        with (disk / "ballast").open("wb") as ballast:
            os.posix_fallocate(ballast.fileno(), 0, free - (1 << 16))
        with pytest.raises(DiskSpaceError, match=r"are free once the old mirror is removed\."):
            make_mirror(tmp_path / "large", mirror, overwrite=True)
        assert tree(mirror) == before
        make_mirror(tmp_path / "new", mirror, overwrite=True)
        assert read_mirrors(tmp_path / "new") == [mirror]


KILLED = """
import json, shutil
from pathlib import Path
import moetier.tools.convert.conversion, transformers.models.mixtral.modeling_mixtral
from moetier.tiers.errors import TargetExistsError
from moetier.tools.convert.api import convert
source, old, work, every = sys.argv[1:]

def converted(target, kill_at=None, replace_first=True):
    'Counts what is removed before anything is made.'
    def converting():
        try:
            convert(source, target, fast=True, replace_first=replace_first)
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
    plainly, _ = converted(shutil.copytree(target, Path(work) / f'{step}-plain'), replace_first=False)
    again, _ = converted(target)
    print(json.dumps([step, died, plainly, again]))
"""


@pytest.mark.parametrize(
    ("cut", "every"),
    [
        pytest.param(False, 9, id="some steps"),
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


def test_files_of_the_user_keep_their_names(tmp_path: Path) -> None:
    """README.md, where a card would be, and files in the folder of downloads."""
    source, folder = save_checkpoint(tmp_path / "src"), tmp_path / "dst"
    convert(source, folder, bits=8, fast=True)
    (folder / "download" / ("a" * 40)).mkdir(parents=True)
    files = {folder / "README.md", folder / "download" / "mine.txt"}
    for path in files:
        path.write_text("mine")
    for how in ({"bits": 8}, {"overwrite": True}, {"replace_first": True}):
        convert(source, folder, fast=True, **how)
        assert {path for path in folder.rglob("*") if path.is_file() and path.read_bytes() == b"mine"} == files, how


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
    room = sum(-(-len(data) // PAGE_BYTES) * PAGE_BYTES for data in new.values()) + SLACK_BYTES
    with mounted("tmpfs", tmp_path / "disk", f"size={room + (1 << 16)}") as disk:
        dst = Path(shutil.copytree(tmp_path / "old", disk / "dst"))

        def is_refused(said: str, **how: bool) -> str:
            with pytest.raises(DiskSpaceError, match=said) as caught:
                convert(source, dst, bits=16, **how)
            assert str(dst) in caught.value.cause
            assert tree(dst) == old
            return caught.value.fix

        (disk / "ballast").write_bytes(bytes(1 << 18))
        for option in ("overwrite", "replace_first"):
            is_refused(r"are free once the old conversion is removed\.", **{option: True})
        (disk / "ballast").unlink()
        (links := disk / "links").mkdir()
        for number, shard in enumerate((dst / GROUP).glob("*/c/*/0/0")):
            os.link(shard, links / str(number))
        is_refused(r"are free once the old conversion is removed\.", replace_first=True)
        shutil.rmtree(links)
        fix = is_refused("the disk has no room for both", overwrite=True)
        assert "--replace-first" in fix
        assert "it is lost then" in fix
        assert not replacement_folder(dst).exists()
        convert(source, dst, bits=16, replace_first=True)
        assert tree(dst) == new
