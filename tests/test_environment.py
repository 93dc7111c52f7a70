"""What conftest.py sets for every test."""

from __future__ import annotations

import subprocess
import sys

import torch


def test_torch_has_one_thread_here_and_in_children() -> None:
    assert torch.get_num_threads() == 1
    code = "import torch; print(torch.get_num_threads())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1\n"
