"""What test_memory runs in a process of its own: load_measured.py FOLDER prints a JSON line of sizes in bytes."""

import json
import re
import sys
from pathlib import Path

import torch

import pymllm.api  # everything that loading imports, so that it is not counted
import pymllm.quantization.formats
from pymllm.kernels.registry import KERNELS, kernels_for

torch.set_num_threads(1)


def status(name: str) -> int:
    """A field of /proc/self/status: VmRSS is what is resident, VmHWM its peak."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def main() -> None:
    pymllm.quantization.formats.load_formats()
    for operation in KERNELS:
        kernels_for(operation)
    torch.ones(64, 64, dtype=torch.bfloat16) @ torch.ones(64, 64, dtype=torch.bfloat16)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    model = pymllm.load_model(sys.argv[1], device="cpu", progress=False)
    report = model.load_report
    print(
        json.dumps(
            {
                "final": report.final_bytes,
                "read": report.bytes_read,
                "peak": status("VmHWM") - before,
                "resident": status("VmRSS") - before,
            }
        )
    )


if __name__ == "__main__":
    main()
