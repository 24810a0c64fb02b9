"""What every rank of test_torchrun runs: rank_that_fails.py HOW FOLDER; rank 1 is killed, or hangs, on its way."""

import os
import signal
import sys
import time

import torch

from pymllm.api import LLM
from pymllm.errors import PymllmError
from pymllm.parallel import Parallel

torch.set_num_threads(1)


def main() -> None:
    how, folder = sys.argv[1:]
    # A hung rank is noticed by the clock alone, a killed one at once.
    parallel = Parallel.from_environment(expert_parallel=True, timeout=5.0 if how == "hangs" else 600.0)
    with parallel:
        llm = LLM(folder, device="cpu", dtype="float32")
        for step in range(1000):
            if step == 3 and parallel.rank == 1:
                if how == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(60)
            started = time.perf_counter()
            try:
                llm.logits([1, 2, 3])
            except PymllmError as error:
                print(
                    f"RANK {parallel.rank} {error.code} after {time.perf_counter() - started:.1f} s: {error}"
                )
                sys.stdout.flush()
                os._exit(7)


if __name__ == "__main__":
    main()
