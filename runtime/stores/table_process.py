"""Make the table of a checkpoint in a process of its own: ``python -m moetier.runtime.stores.table_process FOLDER``.

Prints the table as JSON, or the two lines of a MoetierError.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from moetier.runtime.checkpoint.containers import open_checkpoint
from moetier.tiers.errors import MoetierError

from .checkpoint_store import make_table


def main(folder: Path) -> None:
    """Print the table of the checkpoint in ``folder``, or why there is none."""
    try:
        answer = make_table(open_checkpoint(folder)).to_json()
    except MoetierError as error:
        answer = {"cause": error.cause, "fix": error.fix}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
