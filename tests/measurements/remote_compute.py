"""Measure decoding with experts that daemons compute against experts that are fetched from them.

    python tests/measurements/remote_compute.py --daemons 2 --ram 10%

Each daemon is in a network namespace of its own, behind a link of 1 Gbit/s and .3 ms there and back, with TLS. All
experts are in the daemons' memory; the client has room for a part of them. The same tokens are decoded both ways, by
turns. Bytes are those that the client's interfaces have sent and received. Without DIR, a synthetic model is made (4 of
48 layers of Qwen3-30B-A3B). Client, daemons and links share the cores of this machine.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import shutil
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
import trustme

sys.path.insert(0, str(Path(__file__).parent.parent / "helpers"))

from daemons import running_daemon
from networks import Network, network

import moetier
from moetier.runtime.config import RemoteComputeMode, Size
from moetier.runtime.generation.compat import CACHE
from moetier.runtime.wire.address import Credentials
from moetier.tiers.store.folder import read_manifest, store_folder
from moetier.tools.synthetic.checkpoint import TOKENS_FILE, read_tokens
from moetier.tools.synthetic.store import convert_synthetic
from moetier.tools.synthetic.tensors import make_synthetic


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, nargs="?", metavar="DIR")
    parser.add_argument("--daemons", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--ram", default="10%", help="of the client, as a share of all experts (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="tokens of each round (default: %(default)s)")
    parser.add_argument("--warm", type=int, default=50, help="first tokens that are not counted (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--layers", type=int, default=4, help="of the synthetic model (default: %(default)s)")
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="moetier-elsewhere-") as name, contextlib.ExitStack() as stack:
        base = Path(name)
        directory = arguments.directory or make_store(base, arguments.layers)
        manifest = read_manifest(store_folder(directory))
        bare = Path(shutil.copytree(directory, base / "bare", ignore=shutil.ignore_patterns("c")))
        (base / "token").write_text("token")
        (base / "token").chmod(0o600)
        ca = trustme.CA()
        ca.cert_pem.write_to_path(str(base / "ca"))
        links, addresses = [], []
        for number in range(arguments.daemons):
            link = stack.enter_context(network(slow=True))
            issued = ca.issue_cert(link.there)
            folder = base / f"daemon-{number}"
            folder.mkdir()
            issued.private_key_pem.write_to_path(str(folder / "key"))
            issued.cert_chain_pems[0].write_to_path(str(folder / "cert"))
            options = ["--listen", f"{link.there}:0", "--token-file", base / "token"]
            options += ["--tls-cert", folder / "cert", "--tls-key", folder / "key"]
            daemon = stack.enter_context(
                running_daemon(directory, ram="100%", folder=folder / "d", extra=options, prefix=link.prefix)
            )
            links.append(link)
            addresses.append(daemon.card.listen)
        budget = Size.parse(arguments.ram).of(manifest.stored_bytes)
        print(
            f"machine  {platform.machine()}, {os.cpu_count()} CPUs; {manifest.model}, {len(manifest.blocks)} blocks of "
            f"{manifest.blocks[0].experts} experts of {manifest.layout(0).slot_bytes:,} bytes, of which the client has "
            f"room for {arguments.ram}; {arguments.daemons} daemons, {round_trip(addresses[0]):.2f} ms there and back"
        )
        results: dict[str, list[tuple[float, float]]] = {mode.value: [] for mode in RemoteComputeMode}
        logits: dict[str, torch.Tensor] = {}
        ids = read_tokens(directory) if (directory / TOKENS_FILE).exists() else list(range(3, 250)) * 40
        for round_ in range(arguments.rounds):
            for way in sorted(reverse=round_ % 2 == 1):
                model, _ = moetier.load(
                    bare,
                    ram=budget,
                    daemon=",".join(addresses),
                    remote_compute=way,
                    speculate="off",
                    credentials=Credentials(token_file=base / "token", ca=base / "ca"),
                )
                with model.tiers:
                    rate, sent, last = decode(model, ids, links, arguments.warm, arguments.steps)
                    shares = model.tiers.origin.shares()
                results[way].append((rate, sent))
                assert torch.equal(logits.setdefault("first", last), last), "logits differ"
                records, computed = sum(s.records for s in shares), sum(s.computed for s in shares)
                print(
                    f"{way:<8} {rate:7.2f} tokens/s, {sent:13,.0f} bytes a token; "
                    f"{records:,} records fetched, {computed:,} rows computed in all"
                )
        (fetched, computed_) = (
            [statistics.median(values) for values in zip(*results[way], strict=True)] for way in ("off", "auto")
        )
        print(
            f"computed there against fetched: {computed_[0] / fetched[0]:.2f} times the tokens/s, "
            f"1/{fetched[1] / computed_[1]:.1f} of the bytes; logits are equal"
        )


def make_store(base: Path, layers: int) -> Path:
    make_synthetic(base / "checkpoint", geometry="qwen3-8L", blocks=layers)
    convert_synthetic(base / "checkpoint", base / "store")
    shutil.rmtree(base / "checkpoint")
    return base / "store"


def round_trip(address: str) -> float:
    """Milliseconds in which a TCP connection to HOST:PORT is made: the median of 50."""
    host, _, port = address.rpartition(":")
    seconds = []
    for _ in range(50):
        began = time.perf_counter()
        socket.create_connection((host, int(port))).close()
        seconds.append(1e3 * (time.perf_counter() - began))
    return statistics.median(seconds)


def carried(links: list[Network]) -> int:
    """Bytes that the client's ends of the links have sent and received."""
    folders = [Path("/sys/class/net") / f"{link.device}h" / "statistics" for link in links]
    return sum(int((folder / f"{way}_bytes").read_text()) for folder in folders for way in ("rx", "tx"))


@torch.inference_mode()
def decode(
    model: Any, ids: list[int], links: list[Network], warm: int, steps: int
) -> tuple[float, float, torch.Tensor]:
    """Tokens per second, bytes a token, and the logits of all steps that count."""
    cache, durations = None, []
    began, before = 0.0, 0
    for number, token in enumerate((ids * 10)[: warm + steps]):
        if number == warm:
            began, before = time.perf_counter(), carried(links)
        output = model(torch.tensor([[token]]), **{CACHE: cache}, use_cache=True)
        cache = output.past_key_values
        if number >= warm:
            durations.append(output.logits[0])
    seconds = time.perf_counter() - began
    return steps / seconds, (carried(links) - before) / steps, torch.cat(durations)


if __name__ == "__main__":
    main()
