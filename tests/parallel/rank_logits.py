"""What every rank of test_torchrun runs: rank_logits.py OUTPUT IDS FOLDER...; with FOLDER/adapter, if it is there."""

import json
import sys
from pathlib import Path

import torch

import pymllm
from pymllm.parallel import leave_process_group

torch.set_num_threads(1)


def main() -> None:
    output, ids, *folders = sys.argv[1:]
    results = {}
    for folder in folders:
        llm = pymllm.LLM(folder, device="cpu", dtype="float32", tensor_parallel_size=2)
        results[Path(folder).name] = llm.logits(json.loads(ids))
        if (Path(folder) / "adapter").is_dir():
            llm.load_adapter("adapter", Path(folder) / "adapter")
            results["adapter"] = llm.logits(json.loads(ids), adapter="adapter")
    torch.save(results, Path(output) / f"rank{llm.parallel.rank}.pt")
    leave_process_group()


if __name__ == "__main__":
    main()
