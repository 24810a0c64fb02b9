"""What every rank of test_torchrun runs: rank_logits.py OUTPUT IDS FOLDER..."""

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
        for expert_parallel in (False, True):
            llm = pymllm.LLM(folder, device="cpu", dtype="float32", expert_parallel=expert_parallel)
            results[Path(folder).name, expert_parallel] = llm.logits(json.loads(ids))
    torch.save(results, Path(output) / f"rank{llm.parallel.rank}.pt")
    leave_process_group()


if __name__ == "__main__":
    main()
