"""Draws the page of `moetier serve` in Debian's chromium: python docs/figures/page.py writes page-*.png beside itself.

A real server answers; the model's tokens come from the script that tests/clients/test_page.py has. It needs the extra
``test``, and: apt-get install chromium chromium-driver fonts-noto-core fonts-noto-mono
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
HELPERS = HERE.parent.parent / "tests/helpers"
sys.path.append(str(HELPERS))

from agent_model import write_model  # noqa: E402
from browser import ENTER, Browser, browsing  # noqa: E402
from http_servers import ServerProcess  # noqa: E402
from page_script import SCRIPT  # noqa: E402

IDLE = "!document.body.classList.contains('running')"
READY = "!document.getElementById('app').hidden && document.getElementById('model').value"


def talk(browser: Browser, url: str) -> None:
    """Hold two conversations, of which the second one stays on the page."""
    for text in ("How much does a budget of 3 GiB hold?", "Why does each block have a cache of its own?"):
        browser.go(url)
        browser.wait(READY)
        browser.type("#input", text + ENTER)
        browser.wait(f"document.querySelector('article.assistant .meta').innerText && {IDLE}")
    browser.run("document.activeElement.blur()")


def draw(browser: Browser, name: str) -> None:
    """Write a picture, with the beginning of the last answer at the top."""
    browser.run("document.querySelector('article.assistant').scrollIntoView()")
    browser.wait("document.getAnimations().length === 0")
    browser.picture(HERE / f"page-{name}.png")


def main() -> None:
    """Draw the page in light and dark, and on a phone."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = write_model(folder / "model", HERE.parent.parent / "tests/assets/tinymix")
        (folder / "script").write_text(json.dumps(SCRIPT))
        under = [str(HELPERS / "scripted_server.py"), str(folder / "script"), str(folder / "record")]
        server = ServerProcess(model, folder, ["--name", "toy", "--daemon", "none"], under=under, key="")
        try:
            with browsing(folder) as browser:
                browser.size(1100, 800)
                talk(browser, server.url)
                for scheme in ("light", "dark"):
                    browser.colours(scheme)
                    draw(browser, scheme)
                browser.size(390, 760, phone=True)
                draw(browser, "phone")
        finally:
            server.end()


if __name__ == "__main__":
    main()
