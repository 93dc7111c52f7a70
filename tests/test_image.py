"""A bare Debian root: a wheel is installed there, the Dockerfile's commands run, and its user writes nothing there.

No registry of images is needed: ``debootstrap`` makes the root, with the Python of these tests in it.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from environments import BUILD

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "docs" / "deploy" / "Dockerfile").read_text()
MINUTES = 60
PYTHON = f"/opt/python/bin/python{sys.version_info.major}.{sys.version_info.minor}"  # in the root

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(30 * MINUTES),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to change the root folder"),
    pytest.mark.skipif(shutil.which("debootstrap") is None, reason="needs debootstrap"),
]


def stages() -> dict[str, list[tuple[str, str]]]:
    """Return the instructions of each stage of the Dockerfile, those of the stage that it stands on first."""
    of: dict[str, list[tuple[str, str]]] = {}
    now: list[tuple[str, str]] = []
    for line in DOCKERFILE.splitlines():
        if not line or line.startswith("#"):
            continue
        name, _, rest = line.partition(" ")
        if name == "FROM":
            base, _, stage = rest.partition(" AS ")
            now = of[stage] = list(of.get(base, []))
        else:
            now.append((name, rest))
    return of


class Image:
    """A root folder in which the instructions of the stage ``cpu`` ran."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.volume = root.parent / "models"
        self.variables = {"PATH": "/opt/venv/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LD_LIBRARY_PATH": "/opt/python/lib"}
        self.user = "root"

    def run(self, command: str, *, is_read_only: bool = False) -> subprocess.CompletedProcess[str]:
        """Run a command line of the shell in the root, in a mount namespace of its own."""
        mounts = f"""
            mount --bind {self.root} {self.root}
            {f"mount -o remount,ro,bind {self.root}" if is_read_only else ""}
            mount -t proc proc {self.root}/proc
            mount -t tmpfs tmpfs {self.root}/tmp
            mount --bind {self.volume} {self.root}/models
            exec chroot {"--userspec=moetier " if self.user != "root" else ""}{self.root} sh -c "$1"
        """
        given = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_CERT_FILE"))}
        return subprocess.run(
            ["unshare", "--mount", "sh", "-ec", mounts, "sh", command],
            env=given | self.variables,
            check=False,
            capture_output=True,
            text=True,
            timeout=20 * MINUTES,
        )


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    base = tmp_path_factory.mktemp("image")
    root = base / "root"
    subprocess.run(
        ["debootstrap", "--variant=minbase", "--include=ca-certificates,python3", "stable", root],
        check=True,
        capture_output=True,
        timeout=15 * MINUTES,
    )
    ignored = shutil.ignore_patterns("site-packages", "test", "__pycache__")
    shutil.copytree(sys.base_prefix, root / "opt/python", symlinks=True, ignore=ignored)
    for path in ("/etc/resolv.conf", "/etc/hosts", "/etc/ssl/certs/ca-certificates.crt"):
        shutil.copy(path, root / path[1:])
    for path in ("/etc/xdg/pip", *os.environ.get("PIP_FIND_LINKS", "").split()):  # where pip finds packages here
        if Path(path).is_dir():
            shutil.copytree(path, root / path[1:], dirs_exist_ok=True)
    (root / "models").mkdir()
    made = Image(root)
    made.volume.mkdir()
    for command in (f"{PYTHON} -m ensurepip", f"{PYTHON} -m venv /opt/venv"):
        done = made.run(command)
        assert not done.returncode, done.stderr
    yield made
    shutil.rmtree(base, ignore_errors=True)


def commands_of_readme(wheel: str) -> list[str]:
    """Return the commands of README's first block, which install from ``wheel`` in place of a clone."""
    lines = re.findall(r"^    (.+?)(?:  +#.*)?$", (ROOT / "README.md").read_text().split("![")[0], re.MULTILINE)
    commands = [command for line in lines if "git clone" not in line for command in line.split(" && ")]
    assert commands[-1] == "moetier demo"
    if "PIP_FIND_LINKS" in os.environ:  # torch lies in a folder; its own index may be out of reach
        commands = [command for command in commands if "PIP_EXTRA_INDEX_URL" not in command]
    return [command.replace(".[serve]", f"{wheel}[serve]") for command in commands]


def test_a_wheel_answers_without_compiler_git_and_make(image: Image, tmp_path: Path) -> None:
    """At most six commands lead to the first token of a converted model, with at most 60 packages in 1.5 GB."""
    for program in ("cc", "gcc", "git", "make"):
        assert image.run(f"command -v {program}").returncode, program
    subprocess.run([sys.executable, "-c", BUILD, "wheel", str(tmp_path)], cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    place = image.root / "opt/first"
    place.mkdir()
    shutil.copy(wheel, place)
    commands = commands_of_readme(f"./{wheel.name}")
    assert len(commands) <= 6
    done = image.run(f"cd /opt/first && PATH=/opt/python/bin:$PATH && {' && '.join(commands)}")
    assert done.stdout.splitlines()[-1].startswith("Next: moetier chat"), done.stdout + done.stderr
    listed = json.loads(image.run("/opt/first/.venv/bin/pip list --format=json").stdout)
    megabytes = int(image.run("du -s --block-size=MB /opt/first/.venv").stdout.split("MB")[0])
    print(f"{len(listed)} packages, {megabytes} MB")
    assert len(listed) <= 60, listed
    assert megabytes <= 1500
    shutil.rmtree(place)


def test_the_image_is_built_and_works_read_only(image: Image) -> None:
    for name, rest in stages()["cpu"]:
        match name:
            case "RUN":
                if "PIP_FIND_LINKS" in os.environ:  # torch lies in a folder; its own index may be out of reach
                    rest = re.sub(r"PIP_EXTRA_INDEX_URL=\S+ ", "", rest)
                done = image.run(rest)
                assert not done.returncode, f"{rest}\n{done.stdout}\n{done.stderr}"
            case "COPY":
                source, target = rest.split()
                assert source == "."
                ignored = shutil.ignore_patterns(*(ROOT / ".dockerignore").read_text().split())
                shutil.copytree(ROOT, image.root / target[1:], symlinks=True, ignore=ignored)
            case "ENV":
                image.variables |= dict(re.findall(r"(\w+)=(\S+)", rest))
            case "USER":
                image.user = rest
            case _:
                assert name in ("VOLUME", "HEALTHCHECK", "ENTRYPOINT")
    assert image.volume.stat().st_uid == 10001

    done = image.run("touch /usr/anything", is_read_only=True)
    assert "Read-only file system" in done.stderr
    done = image.run("moetier doctor; id -u", is_read_only=True)
    assert done.stdout.splitlines()[-1] == "10001", done.stdout + done.stderr
    bundled = "$(python -c 'import moetier.assets as a; print(*a.__path__)')/tinymix"
    done = image.run(f"moetier convert {bundled} /models/tiny && moetier generate /models/tiny Once", is_read_only=True)
    assert not done.returncode, done.stdout + done.stderr

    health = re.search(r"HEALTHCHECK .*? CMD (\[.*\])", DOCKERFILE)
    assert health is not None
    check = f"{shlex.join(json.loads(health[1]))} 2> /dev/null"
    served = f"moetier serve /models/tiny & for i in $(seq 120); do {check} && break; sleep 1; done; {check}"
    done = image.run(f"{served}; good=$?; kill $!; exit $good", is_read_only=True)
    assert not done.returncode, done.stdout + done.stderr
