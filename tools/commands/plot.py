"""``moetier plot WHAT T.npz -o F.png``: draw a trace; ``moetier plot resident ADDRESS``: draw a daemon's experts."""

from __future__ import annotations

import argparse
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from moetier.runtime.wire.address import CREDENTIALS
from moetier.tiers.cache.policies import DEFAULT_POLICY
from moetier.tiers.errors import ConfigError
from moetier.tiers.options import MAX_COUNT, Number
from moetier.tools.cli.arguments import add_credentials, asked, credentials
from moetier.tools.cli.parser import UsageError, file_or_address

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXAMPLES = ("moetier plot figure1 trace.npz -o figure1.svg", "moetier plot resident default -o resident.png")

OF_TRACES = ("figure1", "hits", "recall", "heatmap")
KINDS = (*OF_TRACES, "resident")
ONLY = {"tokens": ("figure1",), "blocks": ("figure1",), "cached": ("figure1", "heatmap")}  # option -> its pictures
ONLY |= {option.name: ("resident",) for option in CREDENTIALS.values()}
FORMATS = (".png", ".svg")
CACHED = Number(int, 0, MAX_COUNT, "Give 0 to the number of experts in a block.")
MAX_TOKENS = 200
FEW_TOKENS = 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moetier plot`."""
    parser.add_argument(
        "kind",
        choices=KINDS,
        metavar="WHAT",
        help="figure1: the experts that each token uses, with the token's text; hits: hit ratio against cache size; "
        "recall: recall of the routers' predictions against look-ahead; heatmap: uses and hits of each expert; "
        "resident: which experts a daemon holds, and how often each was used",
    )
    parser.add_argument(
        "source",
        type=file_or_address,
        metavar="T.npz|ADDRESS",
        help="a trace, as moetier trace records it; for resident, a daemon's name, folder or HOST:PORT",
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help="picture to write, a .png or .svg file"
    )
    parser.add_argument(
        "--tokens", type=_span, metavar="A-B", help=f"figure1: tokens to draw (default: the first {FEW_TOKENS})"
    )
    parser.add_argument(
        "--blocks", type=_list, metavar="N,M", help="figure1: blocks to draw (default: four from first to last)"
    )
    parser.add_argument(
        "--cached",
        type=CACHED,
        metavar="N",
        help=f"figure1, heatmap: number of experts of each block in a cache with the policy {DEFAULT_POLICY} (default: "
        "as many as a token uses)",
    )
    add_credentials(parser)


def run(arguments: argparse.Namespace) -> None:
    """Draw the picture.

    Raises UsageError for an option that only other pictures have, ConfigError if the options do not fit the trace or
    matplotlib is missing, DaemonError if no daemon answers, and TargetError if the picture can't be written.
    """
    from moetier.tiers.errors import TargetError

    for name, drawings in ONLY.items():
        if arguments.kind not in drawings and asked(arguments, name):
            option = f"--{name.replace('_', '-')}"
            raise UsageError(
                f"plot {arguments.kind} has no option {option}.",
                f"Leave it out. It is for plot {' and '.join(drawings)}.",
            )
    if arguments.output.suffix.lower() not in FORMATS:
        raise UsageError(f"{arguments.output} is not a .png or .svg file.", "Name a file that ends in .png or .svg.")
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError(
            "moetier plot needs matplotlib, which is not installed.",
            'In the repository of moetier, run: pip install ".[plots]"',
        ) from error
    figure = _draw_daemon(arguments) if arguments.kind == "resident" else _draw_trace(arguments)
    is_svg = arguments.output.suffix.lower() == ".svg"
    try:
        # with these, the same trace always gives the same file, and the text of an SVG stays text
        with matplotlib.rc_context({"svg.hashsalt": "moetier", "svg.fonttype": "none"}), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph")  # a character that no font has is drawn as a box
            figure.savefig(arguments.output, dpi=110, metadata={"Date": None} if is_svg else {"Software": None})
    except OSError as error:
        raise TargetError(
            f"{arguments.output} can't be written: {error.strerror}.", "Name a file in a folder that can be written to."
        ) from error


def _draw_daemon(arguments: argparse.Namespace) -> Figure:
    """Return a picture of the experts that a daemon holds now. Raises DaemonError if it does not report them."""
    from moetier.tiers.errors import DaemonError
    from moetier.tools.top.watch import look
    from moetier.tools.traces.figures import draw_resident

    from .stats import address_of

    address = address_of(arguments.source)
    stats = look(address, credentials(arguments)).stats
    if not all(details.blocks for details in stats.details) or not stats.details:
        raise DaemonError(
            f"The daemon at {address} is of an earlier version, which does not report its experts.",
            "End the daemon, and start it again with this version of moetier.",
        )
    return draw_resident(stats, time=time.strftime("%Y-%m-%d %H:%M:%S"))


def _draw_trace(arguments: argparse.Namespace) -> Figure:
    """Return a picture of a trace. Raises ConfigError if the options don't fit the trace."""
    from moetier.runtime.trace.trace import Trace
    from moetier.tools.traces import figures

    source = Path(arguments.source)
    trace = Trace.load(source)
    if not trace.model:
        trace = replace(trace, model=source.stem)
    cached = trace.top_k if arguments.cached is None else arguments.cached
    if not 0 <= cached <= max(trace.num_experts) or (cached == 0 and arguments.kind == "heatmap"):
        raise ConfigError(
            f"--cached is {cached}, but a block has at most {max(trace.num_experts)} experts.",
            f"Give 1 to {max(trace.num_experts)}.",
        )
    match arguments.kind:
        case "figure1":
            tokens = range(min(FEW_TOKENS, trace.tokens)) if arguments.tokens is None else arguments.tokens
            if tokens.stop > trace.tokens or len(tokens) > MAX_TOKENS:
                raise ConfigError(
                    f"Tokens {tokens.start} to {tokens.stop - 1} can't be drawn.",
                    f"Give a range within 0 to {trace.tokens - 1:,}, of at most {MAX_TOKENS} tokens.",
                )
            last = trace.block_count - 1
            blocks = arguments.blocks or sorted({0, last // 3, 2 * last // 3, last})
            if max(blocks) > last:
                raise ConfigError(
                    f"There is no block {max(blocks)}.", f"Choose from the trace's {last + 1} blocks, counted from 0."
                )
            return figures.draw_use(trace, tokens=tokens, blocks=blocks, cached=cached)
        case "hits":
            return figures.draw_hits(trace)
        case "recall":
            if trace.predictions is None:
                raise ConfigError(
                    f"{arguments.source} has no predictions.", "Record one with moetier trace --look-ahead 1."
                )
            return figures.draw_recall(trace)
    return figures.draw_heatmap(trace, cached=cached)


def _span(text: str) -> range:
    """Parse a range of tokens that includes both ends: "10-49" has 40 tokens. Raises ConfigError if it is empty."""
    first, _, last = text.partition("-")
    if not (span := range(int(first), int(last) + 1)):
        raise ConfigError(f"The range of tokens {text} is empty.", "Give the first and the last token, as in 0-39.")
    return span


def _list(text: str) -> list[int]:
    numbers = sorted({int(part) for part in text.split(",")})
    if numbers[0] < 0:
        raise argparse.ArgumentTypeError("blocks are counted from 0")
    return numbers
