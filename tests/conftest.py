"""Every test must leave as it found: threads, descriptors, shared-memory maps, and torch's number of threads."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import tqdm
from hypothesis import HealthCheck, settings
from longest_first import LongestFirst
from prepared import Prepared, for_commands, share_prepared

if TYPE_CHECKING:
    from moetier.tiers.manifest import Manifest

# The models here are tiny: a second thread costs more than it saves, and where the machine has other work to do the two
# wait for each other at every step. Tests of what threads may not change set their own number. Children inherit this.
os.environ["OMP_NUM_THREADS"] = "1"
if "torch" in sys.modules:  # imported by a plugin: it has read the environment already
    sys.modules["torch"].set_num_threads(1)

# else each of pytest's processes compiles every module of the tests again
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

os.environ["XDG_RUNTIME_DIR"] = "/nonexistent"  # a daemon that happens to run here is none of the tests'
os.environ["XDG_DATA_HOME"] = os.devnull  # nor is a model that has a name; no folder can be made there, even by root
for name in [*os.environ]:  # nor is what somebody has set for the commands
    if name.startswith("MOETIER_"):
        del os.environ[name]
os.environ["MOETIER_CONFIG"] = os.devnull
os.environ["XDG_STATE_HOME"] = os.devnull  # nor are the typed lines that a chat keeps

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a job that a shell began with "&", and in its children
    signal.signal(signal.SIGINT, signal.default_int_handler)

with contextlib.suppress(ImportError):  # obstore's threads and descriptors stay: they begin here, and not in a test
    import obstore.store

    obstore.list(obstore.store.MemoryStore()).collect()

tqdm.tqdm.monitor_interval = 0  # else the first progress bar of anybody starts a thread that stays

# how long an example takes tells of the machine's other work
settings.register_profile("moetier", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("moetier")


def pytest_configure(config: pytest.Config) -> None:
    """Share the user's cache and prepared processes among pytest's processes; compiled kernels with the next run, too.

    Without pytest's cache (``-p no:cacheprovider``) all are compiled anew.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:  # a worker inherits the folder
        user_cache = tempfile.TemporaryDirectory()
        config.add_cleanup(user_cache.cleanup)
        os.environ["XDG_CACHE_HOME"] = user_cache.name
        if hasattr(config, "cache"):
            folder = Path(user_cache.name, "moetier")
            folder.mkdir()
            (folder / "kernels").symlink_to(config.cache.mkdir("kernels"))
        config.add_cleanup(share_prepared())
    if hasattr(config, "cache"):
        config.pluginmanager.register(LongestFirst(config.cache))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Import less: without collections of garbage, as what is imported stays; and where all files are imported, without
    the compiler of torch, which hqq needs, which transformers imports for a cache that no test uses."""
    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            if "PYTEST_XDIST_WORKER" in os.environ:
                patch.setattr("transformers.utils.is_hqq_available", lambda *_: False)
            return (yield)
    finally:
        gc.freeze()
        gc.enable()


GRACE = 30.0  # seconds for what is ending already, on a machine with other work


def _descriptors() -> Counter[str]:
    """Return what this process has open, by its target."""
    targets: Counter[str] = Counter()
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208  # a path for each takes longer than most tests
        with contextlib.suppress(OSError):  # the listing's own
            targets[os.readlink(f"/proc/self/fd/{name}")] += 1  # noqa: PTH115
    return targets


class Arenas:
    """Counts the maps of arenas. The system takes milliseconds to list the maps of a process that has imported torch,
    so they are listed only where there can be an arena."""

    def __init__(self) -> None:
        self._maps_made = 0
        self._count, self._counted_at = 0, 0
        sys.addaudithook(self._notice)

    def _notice(self, event: str, _: object) -> None:
        if event == "mmap.__new__":
            self._maps_made += 1

    def count(self) -> int:
        if self._count or self._counted_at != self._maps_made:
            self._counted_at = self._maps_made
            self._count = Path("/proc/self/maps").read_bytes().count(b"/memfd:moetier-arena")
        return self._count


_arenas = Arenas()


def _threads() -> set[threading.Thread]:
    """All threads but those that are kept: of kernels by the process, and of asyncio by the loop of a server."""
    kept = "moetier-kernels", "asyncio_"
    return {each for each in threading.enumerate() if each.is_alive() and not each.name.startswith(kept)}


@pytest.fixture(scope="module", autouse=True)
def only_its_own_garbage() -> None:
    """What there is when a module begins, most of it imported, stays: collections that come look at what is new, and
    take a hundredth of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def restores_threads() -> Iterator[None]:
    """Give torch its one thread again after each test, as commands and some tests change the number."""
    yield
    if "torch" in sys.modules and sys.modules["torch"].get_num_threads() != 1:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(autouse=True)
def leaves_nothing_behind() -> Iterator[None]:
    """Fails a test that leaks a thread, a descriptor or a map of a memory file."""
    threads, descriptors, arenas = _threads(), _descriptors(), _arenas.count()
    yield
    deadline = time.monotonic() + GRACE
    while True:
        leaked = {
            "threads": [thread.name for thread in _threads() - threads],
            "descriptors": sorted((_descriptors() - descriptors).elements()),
            "arenas": [""] * max(_arenas.count() - arenas, 0),
        }
        if not any(leaked.values()):
            return
        if time.monotonic() > deadline:
            pytest.fail(f"left behind: {leaked}")
        gc.collect()  # a map goes with the last view of it
        time.sleep(0.02)


@pytest.fixture(scope="session")
def scripts() -> Prepared:
    """Runs scripts in processes that have imported what commands with a model need."""
    return for_commands()


@pytest.fixture(scope="session")
def tinymix() -> Path:
    """The bundled checkpoint."""
    return Path(__file__).parent / "assets" / "tinymix"


@pytest.fixture(scope="session")
def tinymix_4bit(tinymix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its model directory at 4 bits. Tests must not change it. It is made by the first of pytest's processes that needs
    it; the others copy it."""
    folder = tmp_path_factory.mktemp("tinymix") / "4bit"
    is_one_of_many = "PYTEST_XDIST_WORKER" in os.environ
    common = (tmp_path_factory.getbasetemp().parent if is_one_of_many else folder.parent) / "made"
    common.mkdir(exist_ok=True)
    with (common / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (common / "4bit").exists():
            from moetier.tools.convert.api import convert

            convert(tinymix, common / "partial", bits=4)
            (common / "partial").rename(common / "4bit")
    shutil.copytree(common / "4bit", folder)
    return folder


@pytest.fixture(scope="session")
def index_only(tinymix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tinymix's config.json and index, without its weights."""
    folder = tmp_path_factory.mktemp("index") / "tinymix"
    folder.mkdir()
    for name in ("config.json", "model.safetensors.index.json"):
        shutil.copy(tinymix / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """A model directory without a model, with 3 blocks of 8 experts, and its manifest: for daemons, where a module has
    no store of its own. Tests must not change it."""
    from stores import make_store

    from moetier.tiers.store.folder import read_manifest

    folder = tmp_path_factory.mktemp("store")
    make_store(folder, experts=8)
    return folder, read_manifest(folder / "experts.zarr")


@pytest.fixture
def short_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a plan's measurements of this machine as short as can be."""
    from moetier.tools.plan import speeds

    for name, value in {
        "DISK_SECONDS": 0.02,
        "KERNEL_SECONDS": 0.0,
        "UNCACHED_BYTES": 1 << 20,
        "QUANTISED_WEIGHTS": 1 << 16,
    }.items():
        monkeypatch.setattr(speeds, name, value)


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """$XDG_RUNTIME_DIR; the daemons of the tests are in ``moetier`` beneath it."""
    folder = tmp_path / "run"
    (folder / "moetier").mkdir(mode=0o700, parents=True)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    return folder


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for pulled models, which children inherit."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path / "data" / "moetier" / "models"
