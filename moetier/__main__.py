"""``python -m moetier``: the command line, or with ``-m MODULE`` a program whose models get budgets."""

from __future__ import annotations

import sys

from moetier.tools.program import main

sys.exit(main(sys.argv[1:]))
