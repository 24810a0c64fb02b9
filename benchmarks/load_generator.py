"""Let a public load generator, guidellm, measure `pymllm serve`: it knows the server as OpenAI's API alone.

    python -m venv build/guidellm && build/guidellm/bin/pip install 'guidellm>=0.8,<0.9'
    python benchmarks/load_generator.py --guidellm build/guidellm/bin/guidellm [--model MODEL] [--streams 1 4 16 64]

guidellm brings torch; with CUDA that takes 6 GB, see constraints.txt. For each number of streams it keeps so many
requests under way, each a chat with a prompt of 128 tokens of synthetic text and an answer of 64, until `--requests`
(128) are done. Without --model the shipped one is served; --tokenizer names a folder where the model has none that
transformers reads. It takes some minutes. The script writes results/load_generator.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import roofline

from pymllm.api import shipped_model

PROMPT, ANSWER = 128, 64  # tokens
COLUMNS = {
    "time_to_first_token_ms": "first token, ms",
    "inter_token_latency_ms": "between tokens, ms",
    "request_latency": "whole answer, s",
}


def served(command: list[str], environment: dict[str, str]) -> tuple[subprocess.Popen[str], str, str]:
    """Start a server.  Returns its process, its address and its model's name."""
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("Serving "):
            name, rest = line.removeprefix("Serving ").split(" at ", 1)
            return process, rest.split("/v1")[0], name
    raise SystemExit(f"the server did not start: {command}")


def measure(
    guidellm: str, url: str, model: str, tokenizer: str, streams: list[int], requests: int
) -> list[Any]:
    """Run guidellm, each number of streams in turn.  Returns its figures of the requests that succeeded."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.json"
        options: dict[str, dict[str, Any]] = {
            "backend": {"kind": "openai_http", "target": url, "model": model},
            "profile": {"kind": "concurrent", "streams": streams},
            "constraint": {"kind": "max_requests", "count": requests},
            "tokenizer": {"kind": "huggingface_auto", "model": tokenizer},
            "data": {"kind": "synthetic_text", "prompt_tokens": PROMPT, "output_tokens": ANSWER},
            "output": {"kind": "json", "path": str(file)},
        }
        arguments = [part for name, value in options.items() for part in (f"--{name}", json.dumps(value))]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        subprocess.run([guidellm, "run", *arguments, "--disable-console"], check=True, env=environment)
        found = [one["metrics"] for one in json.loads(file.read_text())["benchmarks"]]
    rows = []
    for number, metrics in zip(streams, found, strict=True):
        row: dict[str, Any] = {"streams": number, "requests": metrics["request_totals"]}
        for name in COLUMNS:
            percentiles = metrics[name]["successful"]["percentiles"]
            row[name] = {percentile: percentiles[percentile] for percentile in ("p50", "p95", "p99")}
        for name in ("output_tokens_per_second", "requests_per_second"):
            row[name] = metrics[name]["successful"]["mean"]
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--guidellm", default="guidellm", help="the command")
    parser.add_argument("--model")
    parser.add_argument("--tokenizer", help="a folder with the model's tokenizer; default: the model's")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--requests", type=int, default=128, help="of each number of streams")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    info = roofline.machine()
    version = subprocess.run(
        [options.guidellm, "--version"], capture_output=True, text=True, check=True
    ).stdout
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(options.threads),
        "PYTHONPATH": os.pathsep.join(
            filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")))
        ),
    }
    model = [options.model] if options.model else []
    process, url, name = served([sys.executable, "-m", "pymllm", "serve", *model, "--port", "0"], environment)
    tokenizer = options.tokenizer or options.model or str(shipped_model())
    try:
        rows = measure(options.guidellm, url, name, tokenizer, options.streams, options.requests)
    finally:
        process.terminate()
        process.wait()
    lines = [
        "# A public load generator before the server",
        "",
        roofline.describe(info),
        "",
        f"{version.strip()} before `pymllm serve` of {name}, {options.threads} thread(s): chats with prompts of "
        f"{PROMPT} tokens and answers of {ANSWER}, so many at a time. Percentiles 50 / 95 / 99 of the requests that "
        "succeeded.",
        "",
        "| streams | done | failed | " + " | ".join(COLUMNS.values()) + " | answers, tokens/s | requests/s |",
        "| --- " * (len(COLUMNS) + 5) + "|",
    ]
    for row in rows:
        totals = row["requests"]
        spread = [" / ".join(f"{value:.3g}" for value in row[name].values()) for name in COLUMNS]
        ends = [f"{row['output_tokens_per_second']:.1f}", f"{row['requests_per_second']:.2f}"]
        cells = [str(row["streams"]), str(totals["successful"]), str(totals["errored"]), *spread, *ends]
        lines.append("| " + " | ".join(cells) + " |")
    (roofline.RESULTS / "load_generator.md").write_text("\n".join(lines) + "\n")
    kept = {"machine": info, "generator": version.strip(), "model": name, "rows": rows}
    (roofline.RESULTS / "load_generator.json").write_text(json.dumps(kept, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
