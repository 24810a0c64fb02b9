"""What every rank of test_torchrun runs: rank_that_fails.py HOW FOLDER; rank 1 is killed, or hangs, on its way."""

import os
import signal
import sys
from datetime import timedelta

import torch
from torch.distributed import distributed_c10d

from pymllm.api import LLM
from pymllm.errors import PymllmError
from pymllm.parallel import Parallel

torch.set_num_threads(1)


def main() -> None:
    how, folder = sys.argv[1:]
    # A killed rank is noticed at once: its test waits for less than an hour.
    parallel = Parallel.from_environment(expert_parallel=True, timeout=3600.0)
    with parallel:
        llm = LLM(folder, device="cpu", dtype="float32")
        for step in range(1000):
            # A hung rank is noticed by the clock alone; all ranks are up by now.
            if step == 3 and how == "hangs":
                distributed_c10d._set_pg_timeout(timedelta(seconds=5))
            if step == 3 and parallel.rank == 1:
                if how == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                signal.pause()
            try:
                llm.logits([1, 2, 3])
            except PymllmError as error:
                print(f"RANK {parallel.rank} {error.code}: {error}", flush=True)
                os._exit(7)


if __name__ == "__main__":
    main()
