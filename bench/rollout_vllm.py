"""The vLLM side of bench.rollout: runs alone, under a Python that has vLLM (and nothing of fastppo).

    python rollout_vllm.py MODEL_FOLDER < rounds.json

Standard input: {"slots": n, "top_p": p, "max_new_tokens": n, "ignore_eos": bool, "threads": n,
"dtype": name, "rounds": [[ids, …], …]}.
The first round warms up. The last line of standard output: {"seconds": […], "tokens": […], "version": …}.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

# Before vLLM is imported: threads are counted by us, and no worker is pinned to a core that another wants.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def main() -> None:
    request: dict[str, Any] = json.load(sys.stdin)
    os.environ["OMP_NUM_THREADS"] = str(request["threads"])
    import torch
    import vllm  # type: ignore[import-not-found, unused-ignore]

    torch.set_num_threads(request["threads"])
    longest = max(len(ids) for prompts in request["rounds"] for ids in prompts)
    model = vllm.LLM(
        model=sys.argv[1],
        dtype=request["dtype"],
        max_model_len=longest + request["max_new_tokens"],
        max_num_seqs=request["slots"],
        seed=0,
    )
    sampling = vllm.SamplingParams(
        temperature=1.0,
        top_p=request["top_p"],
        max_tokens=request["max_new_tokens"],
        ignore_eos=request["ignore_eos"],
        detokenize=False,
    )
    seconds, tokens = [], []
    for prompts in request["rounds"]:
        start = time.perf_counter()
        outputs = model.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
        seconds.append(time.perf_counter() - start)
        tokens.append(sum(len(output.outputs[0].token_ids) for output in outputs))
    result = {"seconds": seconds[1:], "tokens": tokens[1:], "version": vllm.__version__}
    print(json.dumps(result | {"threads": torch.get_num_threads(), "dtype": request["dtype"]}))


if __name__ == "__main__":
    main()
