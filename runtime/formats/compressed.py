"""Checkpoints of compressed-tensors: FP8, MXFP8, MXFP4, NVFP4 and INT4 without zero points."""

from __future__ import annotations

from .scaled import BLOCK, Scaled, pair_of_sizes, unreadable

READABLE = (
    "pack-quantized", "mxfp4-pack-quantized", "nvfp4-pack-quantized", "mxfp8-quantized", "float-quantized",
    "naive-quantized", "mixed-precision", "dense",
)  # fmt: skip


class CompressedTensors(Scaled):
    """Weights with scales, described by the schemes of ``config_groups``."""

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns that share an FP8 scale. Raises UnsupportedModelError for schemes that can't be read."""
        groups = self.quantization.get("config_groups")
        schemes = [scheme for scheme in groups.values() if isinstance(scheme, dict)] if isinstance(groups, dict) else []
        weights = [
            scheme_of_weights for scheme in schemes if isinstance(scheme_of_weights := scheme.get("weights"), dict)
        ]
        names = {str(place.get("format") or "dense") for place in (self.quantization, *schemes)}
        if others := sorted(names - set(READABLE)):
            raise unreadable(f"the format {others[0]}")
        for scheme in weights:
            bits, number = scheme.get("num_bits"), scheme.get("type")
            if bits not in (4, 8) or (number, bits) == ("int", 8):
                raise unreadable(f"weights of {bits} bits of type {number}")
            if scheme.get("symmetric") is False:
                raise unreadable("weights with zero points")
        named = (scheme.get("block_structure") for scheme in weights)
        return pair_of_sizes(next(filter(None, named), None)) or BLOCK
