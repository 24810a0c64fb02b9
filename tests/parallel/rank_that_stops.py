"""Rank 1 is stopped before a sum of both ranks; rank 0 has to be told, and to end, while it is."""

import os
import signal
import sys
from pathlib import Path

import torch

from pymllm.errors import RankError
from pymllm.parallel import Parallel

parallel = Parallel.from_environment()
parallel.all_reduce(torch.ones(2))
where = Path(sys.argv[1])
if parallel.rank == 1:
    (where / "pid").write_text(str(os.getpid()))
    os.kill(os.getpid(), signal.SIGSTOP)
try:
    parallel.all_reduce(torch.ones(2))
except RankError as error:
    (where / "told").write_text(str(error))
    raise
