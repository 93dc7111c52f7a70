"""Make the picture of ``moetier top`` for docs/sharing.md, with a real daemon and two conversations that use it.

    moetier convert tests/assets/tinymix DIR --bits 4 --fast
    python tests/measurements/top.py DIR docs/figures/top.png

The picture can be an .svg file, or a .png file if CairoSVG is installed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from daemons import running_daemon

from moetier.runtime.config import Size
from moetier.runtime.wire.address import Address, Credentials
from moetier.tiers.store.folder import read_manifest, store_folder
from moetier.tools.top.app import Top
from moetier.tools.top.watch import Watch

PROMPTS = ("Once upon a time", "The little dog", "In the garden", "One day a girl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--ram", default="60%", help="of all experts (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of traffic (default: %(default)s)")
    parser.add_argument("--interval", type=float, default=0.5)
    parser.add_argument("--size", default="150x33", help="of the terminal (default: %(default)s)")
    parser.add_argument("--keys", default="", help="that are typed before the picture is taken, with commas between")
    arguments = parser.parse_args()
    ram = Size.parse(arguments.ram).of(read_manifest(store_folder(arguments.directory)).stored_bytes)
    with (
        tempfile.TemporaryDirectory() as base,
        running_daemon(arguments.directory, ram=ram, folder=folder_in(Path(base))) as daemon,
        traffic(arguments.directory, daemon.folder),
        traffic(arguments.directory, daemon.folder),
    ):
        picture = asyncio.run(watch(daemon.address, arguments))
    if arguments.output.suffix == ".png":
        import cairosvg  # type: ignore[import-not-found,import-untyped,unused-ignore]

        picture = picture.replace("Fira Code", "DejaVu Sans Mono")  # which the SVG would fetch
        cairosvg.svg2png(bytestring=picture.encode(), write_to=str(arguments.output), output_width=1500)
    else:
        arguments.output.write_text(picture)


def folder_in(base: Path) -> Path:
    """Of the default name, in a runtime folder that no other daemon is in."""
    os.environ["XDG_RUNTIME_DIR"] = str(base)
    (base / "moetier").mkdir(mode=0o700)
    return base / "moetier" / "default"


async def watch(address: Address, arguments: argparse.Namespace) -> str:
    """The screen as an SVG, after so many seconds."""
    width, _, height = arguments.size.partition("x")
    app = Top([], address, Watch(Credentials(), arguments.interval))
    async with app.run_test(size=(int(width), int(height))) as pilot:
        end = time.monotonic() + arguments.seconds
        while time.monotonic() < end:
            await pilot.pause(0.1)
        await pilot.press(*filter(None, arguments.keys.split(",")))
        await pilot.pause(2 * arguments.interval)
        return app.export_screenshot(title="moetier top")


@contextlib.contextmanager
def traffic(directory: Path, folder: Path) -> Iterator[None]:
    """A process that goes on answering."""
    command = [str(Path(sys.executable).with_name("moetier")), "chat", str(directory), "--daemon", str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        assert process.stdin is not None
        process.stdin.write("\n".join(f"{prompt}\n/reset\n" for prompt in PROMPTS * 50))
        process.stdin.flush()
        yield
    finally:
        process.kill()
        process.communicate()


if __name__ == "__main__":
    main()
