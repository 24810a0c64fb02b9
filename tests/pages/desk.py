"""A reader's desk: a folder in which what the pages name is there, each under the name that they use."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from pymllm.api import shipped_model

from ..adapters.handwritten import adapter_for_shipped
from ..block_checkpoints import write_blocks
from ..embedding import encoders
from ..moe_checkpoints import write_moe

# What pages call a model of the reader's own: the one that ships here takes its place.
MODELS = (
    "MODEL",
    "path/to/model",
    "path/or/hub-id",
    "org/name",
    "org/name-AWQ",
    "org/model",
    "smaller-model",
)
ADAPTERS = ("path/to/adapter", "path/to/another", "org/adapter")
TEXT = (
    "def read_lines(path):\n    with open(path) as file:\n        return file.read().splitlines()\n\n\n" * 40
)
REQUEST = {
    "custom_id": "q1",
    "method": "POST",
    "url": "/v1/completions",
    "body": {"prompt": "def f(x):", "max_tokens": 4},
}


def lay_out(folder: Path, llm) -> Path:
    """Put what the pages name into a folder.  llm: the shipped model, loaded."""
    shipped, vocabulary = shipped_model(), llm.config.size("vocab_size")
    for name in MODELS:
        _link(folder / name, shipped)
    for name in ADAPTERS:
        adapter = folder / name
        adapter.mkdir(parents=True)
        adapter_for_shipped(adapter, llm)
    encoders.write(
        folder / "sentence-transformers/all-MiniLM-L6-v2",
        encoders.make_model("bert"),
        {"Pooling": {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}},
    )
    for name, family in (
        ("SDAR-8B-Chat", "sdar"),
        ("SDAR-8B-Chat-b32", "sdar"),
        ("Fast_dLLM_v2_7B", "fast_dllm_qwen"),
    ):
        write_blocks(folder / name, family, vocab_size=vocabulary, mask_token_id=3)
        shutil.copy(shipped / "tokenizer.json", folder / name)
    write_moe(folder / "MIXTURE", "qwen3_moe", vocab_size=vocabulary)
    shutil.copy(shipped / "tokenizer.json", folder / "MIXTURE")
    for name in ("text.txt", "prompt.txt"):
        (folder / name).write_text(TEXT)
    (folder / "requests.jsonl").write_text(json.dumps(REQUEST) + "\n")
    return folder


def _link(at: Path, to: Path) -> None:
    at.parent.mkdir(parents=True, exist_ok=True)
    at.symlink_to(to, target_is_directory=True)
