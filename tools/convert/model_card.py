"""The model card of a model directory: README.md, which says what the weights are, and how a program loads them."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from moetier.tiers.errors import ConfigError
from moetier.tiers.manifest import Manifest
from moetier.tiers.store.atomic import write_durably
from moetier.tiers.text import format_bytes
from moetier.tools.cli.failure import plain

CARD = "README.md"
LIBRARY = "moetier"  # the card's and config.json's library_name
# of the cards that moetier writes and may replace: without this line, the file is the user's
MARK = "<!-- moetier convert wrote this file, and replaces it. Remove this line to keep it as it is. -->"
MAX_BYTES = 1 << 16  # of a file that is looked at for MARK
METHODS = {
    "hqq": "quantised by HQQ",
    "rounding": "rounded to the nearest value",
    "native": "those of the checkpoint",
}
TEMPLATE = """\
---
library_name: {library}
{base}tags:
- {library}
- mixture-of-experts
---
{mark}

# {name}

Experts of {bits} bits and a trunk of {trunk_bits} bits, for moetier, which keeps the trunk in memory, and as many
experts as there is room for.

```python
import moetier

with moetier.load({place}) as (model, tokenizer):  # {where}
    inputs = tokenizer("Once upon a time", return_tensors="pt")
    print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

| | |
|---|---|
{rows}
"""


def model_card(manifest: Manifest, place: str = "", quality: Path | None = None) -> bytes:
    """Return the card of a model.

    Args:
        manifest: that of the model's store.
        place: the address at which the model is; "" if the card is in the model's folder.
        quality: what ``moetier quality --json`` printed of the model.

    Raises ConfigError if ``quality`` can't be used.
    """
    layouts = manifest.layouts.values()
    groups = sorted({p.group for layout in layouts for p in layout.projections if p.group})
    rows = {
        "made from": _code(manifest.model),
        "experts": f"{len(manifest.blocks)} blocks, {manifest.record_count} experts, "
        f"{format_bytes(manifest.stored_bytes)}",
        "weights of experts": METHODS.get(manifest.method, _code(manifest.method))
        + (f", in groups of {' or '.join(map(str, groups))}" if groups else ""),
        "solver": str(manifest.solver),
        "digest": _code(manifest.digest),
        "digest of the checkpoint": _code(manifest.source_digest),
        "written by": _code(f"moetier {manifest.version}"),
    }
    if quality is not None:
        rows["perplexity"] = _perplexity(quality)
    return TEMPLATE.format(
        library=LIBRARY,
        base=f"base_model: {json.dumps(manifest.model)}\n" if "/" in manifest.model else "",
        mark=MARK,
        name=f"{plain(manifest.model)}, {manifest.bits} bits",
        bits=manifest.bits,
        trunk_bits=manifest.trunk_bits,
        place=json.dumps(place or "."),
        where="its address" if place else "run this in the folder of this file",
        rows="\n".join(f"| {what} | {text} |" for what, text in rows.items()),
    ).encode()


def write_card(folder: Path, manifest: Manifest) -> None:
    """Write the card of the model directory ``folder``, unless the user has a file of its name there."""
    path = folder / CARD
    if not os.path.lexists(path) or is_card(path):
        write_durably(path, model_card(manifest))


def is_card(path: Path) -> bool:
    """Return whether moetier wrote the file ``path``, and may replace it."""
    with contextlib.suppress(OSError), path.open("rb") as stream:
        return MARK.encode() in stream.read(MAX_BYTES)
    return False


def _code(text: str) -> str:
    return "`" + plain(text).replace("`", "'").replace("|", "/") + "`"


def _perplexity(path: Path) -> str:
    """Return the perplexity that a file of ``moetier quality --json`` has, as text. Raises ConfigError."""
    try:
        document: dict[str, Any] = json.loads(path.read_bytes())
        (row,) = document["rows"]
        texts, tokens = ", ".join(_code(str(name)) for name in row["perplexity_by_text"]), int(document["tokens"])
        return f"{float(row['perplexity']):.3f} over {texts}, at most {tokens:,} tokens of each"
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} is not what moetier quality prints of a model directory ({type(error).__name__}: {error}).",
            f"Make it: moetier quality DIR --text FILE --json > {path}",
        ) from error
