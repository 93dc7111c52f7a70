"""``python -m moetier`` is the ``moetier`` command."""

from __future__ import annotations

import sys

from moetier.tools.main import command

sys.exit(command())
