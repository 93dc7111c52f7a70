"""The bar of a prompt, on a real terminal."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from terminals import Terminal

PROMPT = "la mattina seguente " * 100
SIZE = 100, 30  # of the terminal
SHOWN = r"prompt of \d,?\d+ tokens: +(\d+)%"

# without the second in which most prompts need no bar
SCRIPT = """
import sys
from moetier.tools.cli import progress
from moetier.tools.main import main
progress.PROMPT_SECONDS = 0
sys.exit(main(sys.argv[1:]))
"""


def test_generate_shows_how_far_its_prompt_is(tinymix_4bit: Path) -> None:
    options = "--max-new-tokens 4 --prefill-chunk 32 --daemon none"
    words = ["generate", str(tinymix_4bit), PROMPT, *options.split()]
    with Terminal("-c", SCRIPT, *words, size=SIZE) as terminal:
        terminal.wait_for("tokens/s")
        assert terminal.status() == 0
        screen = terminal.screen
    parts = [int(found) for found in re.findall(SHOWN, screen)]
    assert parts == sorted(parts)
    assert parts[0] == 0
    last = list(re.finditer(SHOWN, screen))[-1].end()
    assert "tokens/s" in screen[last:], "it ends before the text"
    done = subprocess.run([sys.executable, "-c", SCRIPT, *words], capture_output=True, text=True, check=True)
    assert "prompt of" not in done.stdout + done.stderr


def test_chat_shows_how_far_its_prompt_is(tinymix_4bit: Path) -> None:
    words = ["chat", str(tinymix_4bit), "--max-new-tokens", "4", "--daemon", "none"]
    with Terminal("-c", SCRIPT, *words, size=SIZE) as terminal:
        terminal.wait_for(">>> ")
        terminal.type("la mattina " * 40 + "\n")
        terminal.wait_for(SHOWN)
        terminal.wait_for("first after .*>>> ")
        terminal.type("/exit\n")
        assert terminal.status() == 0
