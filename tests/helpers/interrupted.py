"""Generate with a model while exceptions come from outside at random moments, in a process of its own.

Prints how many came as JSON. Afterwards the same model must give the right tokens, and its tiers must agree.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from types import FrameType
from typing import Any

import torch
from integrity import check_integrity

import moetier

HANG = 200.0  # seconds without an end of generate(), on a machine that is busy
TOKENS = 6


class Alarm(Exception):
    """Exception of a user's own signal handler, as those of timeouts raise."""


def raise_alarm(number: int, frame: FrameType | None) -> None:
    raise Alarm


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory")
    parser.add_argument("--ram")
    parser.add_argument("--daemon", default="none")
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--signal", choices=["SIGINT", "SIGALRM"], default="SIGINT")
    parser.add_argument("--longest", type=float, default=0.05, help="seconds until a signal comes, at most")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model, _ = moetier.load(arguments.directory, ram=arguments.ram, daemon=arguments.daemon, speculate="always")
    number = signal.Signals[arguments.signal]
    expected_error: type[BaseException] = KeyboardInterrupt
    if number is signal.SIGALRM:
        signal.signal(number, raise_alarm)
        expected_error = Alarm
    chance = random.Random(arguments.seed)
    prompts = [torch.tensor([[chance.randrange(200) for _ in range(size)]]) for size in (1, 3, 17)]

    def generate(prompt: torch.Tensor) -> list[int]:
        faulthandler.dump_traceback_later(HANG, exit=True)
        out: Any = model.generate(prompt, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
        return list(out[0].tolist())

    right = [generate(prompt) for prompt in prompts]
    where: Counter[str] = Counter()
    latencies = []
    for turn in range(arguments.count):
        sent = 0.0

        def send(seconds: float = chance.uniform(0.0, arguments.longest)) -> None:
            nonlocal sent
            time.sleep(seconds)
            sent = time.perf_counter()
            os.kill(os.getpid(), number)

        try:
            sender = threading.Thread(target=send)
            sender.start()
            while True:
                generate(prompts[turn % len(prompts)])
        except expected_error as error:
            latencies.append(time.perf_counter() - sent)
            trace = error.__traceback__
            last = "?"
            while trace is not None:
                name = trace.tb_frame.f_globals.get("__name__", "")
                if name.startswith("moetier"):
                    last = f"{name}:{trace.tb_frame.f_code.co_name}"
                trace = trace.tb_next
            where[last] += 1
            if turn % 2:  # as a prompt of Python does, which keeps the frames
                sys.last_value = error
        sender.join()
        if turn % 5 == 4:
            with contextlib.suppress(AttributeError):
                check_integrity(model.tiers.host)
            index = turn % len(prompts)
            text = generate(prompts[index])
            assert text == right[index], f"after {turn + 1}: {text}, not {right[index]}"
    sys.last_value = None
    assert [generate(prompt) for prompt in prompts] == right
    with contextlib.suppress(AttributeError):
        check_integrity(model.tiers.host)
    print(
        json.dumps(
            {
                "interrupts": sum(where.values()),
                "where": dict(where.most_common(12)),
                "slowest": max(latencies),
            }
        )
    )
    faulthandler.cancel_dump_traceback_later()
    model.tiers.close()


if __name__ == "__main__":
    main()
