"""Run transformers with accelerate's disk offload: read a job from standard input and print the result, both as JSON.

``engines.py`` starts this program.
"""

from __future__ import annotations

import json
import sys
import time

from own_variables import remove_own_variables

from moetier.runtime.machine.memory import peak_bytes


def main() -> None:
    """Feed the tokens of the job on standard input one by one, and print their time and the peak memory as JSON."""
    job = json.load(sys.stdin)
    remove_own_variables()
    import torch
    import transformers

    from moetier.runtime.generation.compat import CACHE

    torch.set_num_threads(job["threads"])
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    room = {} if job["resident"] is None else {"max_memory": {"cpu": job["resident"]}}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        job["checkpoint"], dtype=torch.bfloat16, device_map="auto", offload_folder=job["offload"], **room
    )
    cache = transformers.DynamicCache()
    start = 0.0
    with torch.inference_mode():
        for position, token in enumerate(job["tokens"]):
            if position == job["warmup"]:
                start = time.perf_counter()
            model(input_ids=torch.tensor([[token]]), **{CACHE: cache}, use_cache=True)
    result = {
        "tokens": len(job["tokens"]) - job["warmup"],
        "seconds": time.perf_counter() - start,
        "peak_bytes": peak_bytes(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
