"""A model whose blocks have records of two sizes."""

from __future__ import annotations

from stores import SOURCE_DIGEST, layout_of

from moetier.tiers.manifest import Block, Manifest


def two_layouts() -> Manifest:
    """Blocks 0 and 2: top-3 of 4 big records; blocks 1, 3 and 4: top-2 of 4 small ones."""
    arrays = ["big", "small", "big", "small", "small"]
    return Manifest(
        model="acme/two-sizes",
        source_digest=SOURCE_DIGEST,
        blocks=tuple(
            Block(f"model.layers.{b}.experts", array, arrays[:b].count(array), 4, 3 if array == "big" else 2)
            for b, array in enumerate(arrays)
        ),
        layouts={"big": layout_of(128), "small": layout_of(64)},
        version="0.1.0",
    )
