"""Options of a conversion."""

# ruff: noqa: RUF009 - each call of these functions returns a new field

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moetier.runtime.config import TIER_OPTIONS
from moetier.tiers.errors import ConfigError
from moetier.tiers.layout import BITS, GROUPS, PAIR_TYPES, TRUNK_BITS, Bits
from moetier.tiers.options import COUNT, option, option_like, options_of

NATIVE: Literal["native"] = "native"
DEFAULT_BITS: Bits = 4


@dataclass(frozen=True)
class Options:
    """Options of ``convert`` and ``pull``. They are declared here only.

    None stands for a default that depends on the bits or on the machine. Raises ConfigError for a value that is not
    allowed, and if no model can be stored with the combination.
    """

    bits: Bits | Literal["native"] | None = option(
        None,
        f"bits per expert weight; native: keep weights as the checkpoint stores them (default: {DEFAULT_BITS}; convert "
        "takes native if they are quantised to fewer than 8 bits, or by HQQ, AWQ or GPTQ)",
        types=int | str | None,
        choices=(*BITS, NATIVE),
        resumes=True,
    )
    trunk_bits: Bits = option(
        16,
        "bits per weight of everything else, except embeddings, norms and routers, which stay as they are",
        choices=TRUNK_BITS,
        resumes=True,
    )
    group_size: int | None = option(
        None,
        "number of weights that share a scale (default: depends on --bits)",
        types=int | None,
        metavar="N",
        choices=tuple(sorted(set[int]().union(*GROUPS.values()))),
        resumes=True,
    )
    pairs: str | None = option(
        None, "format of the scales (default: depends on --bits)", types=str | None, choices=PAIR_TYPES, resumes=True
    )
    fast: bool = option(
        False, "round to the nearest value instead of optimising with HQQ: faster, but less accurate", resumes=True
    )
    workers: int | None = option(
        None,
        "number of experts to quantise at a time, each on a thread (default: as --threads, or fewer if memory is "
        "short)",
        metavar="N",
        numbers=COUNT,
    )
    threads: int | None = option_like(TIER_OPTIONS["threads"], group="")
    overwrite: bool = option(
        False,
        "replace a model that is there already. It stays in place until the new one, made beside it, is complete",
        is_setting=False,
    )
    replace_first: bool = option(
        False,
        "as --overwrite, but remove the old model before the new one is made, where the disk has no room for both: it "
        "is lost even if the conversion fails",
        is_setting=False,
    )
    ignore_code: bool = option(
        False, "accept a checkpoint with code of its own, which moetier never runs", is_setting=False, resumes=True
    )
    revision: str | None = option(
        None, "branch, tag or commit on the hub (default: main)", types=str | None, metavar="REV"
    )
    keep_source: bool = option(
        False,
        "keep downloaded files in huggingface_hub's cache (default: delete each file once it is converted)",
        is_setting=False,
        resumes=True,
    )

    def __post_init__(self) -> None:
        from moetier.tiers.quant.codec import group_and_pairs

        for name, declaration in CONVERT_OPTIONS.items():
            declaration.read(getattr(self, name))
        fast = self.fast and self.trunk_bits == 16
        bits = 16 if self.bits == NATIVE else self.bits or DEFAULT_BITS
        if bits == 16 and (self.group_size is not None or self.pairs is not None or fast):
            raise ConfigError(
                f"With --bits {self.bits} nothing is quantised, so --group-size, --pairs and --fast have no effect.",
                "Leave out --group-size, --pairs and --fast, or choose fewer --bits.",
            )
        group_and_pairs(bits, self.group_size, self.pairs)


CONVERT_OPTIONS = options_of(Options)
