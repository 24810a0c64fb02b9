"""The files beside the weights: config.json with its quantisation, the tokenizer's files, the model card."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pymllm.embedding.settings import PROMPTS, find_folder, read_modules
from pymllm.weights.folder import CONFIG, INDEX, MODULES, module_path

COPIED = (".json", ".jinja", ".model", ".txt", ".tiktoken")
LEGAL = re.compile(r"(?i)(licen[cs]e|notice|use_policy|acceptable_use)")
CARD = "README.md"
# Settings of the source's own quantisation beside its config.json, which would contradict the new ones.
STALE = {"quant_config.json", "quantize_config.json", "hf_quant_config.json", "recipe.yaml"}
LARGEST = 256 << 20  # bytes of a file that is copied: a tokenizer's may have tens of MB


def files_to_copy(folder: Path) -> list[Path]:
    """List the tokenizer's files, generation config, chat templates, licences: small files but weights and configs."""
    if not folder.is_dir():
        return []
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and not path.name.startswith(".")
        and (path.suffix in COPIED or LEGAL.match(path.name))
        and path.name not in STALE | {CONFIG, INDEX, CARD}
        and not path.name.endswith(".index.json")
        and path.stat().st_size <= LARGEST
    ]


def embedding_files(path: Path) -> dict[str, bytes]:
    """Read the files by which sentence-transformers finds a model's modules, by their names beside the weights.

    path: the checkpoint's. There, the model may lie in a folder of its own; what is written has it beside modules.json.
    """
    folder = find_folder(path)
    if folder is None:
        return {}
    first, *others = read_modules(folder / MODULES)
    entries = [{**first, "path": ""}, *others]
    files = {MODULES: (json.dumps(entries, indent=2) + "\n").encode()}
    if (folder / PROMPTS).is_file():
        files[PROMPTS] = (folder / PROMPTS).read_bytes()
    for entry in others:
        name = module_path(entry.get("path", ""), folder / MODULES)
        for file in sorted((folder / name).iterdir()) if name and (folder / name).is_dir() else ():
            if file.is_file() and file.suffix in (".json", ".safetensors") and file.stat().st_size <= LARGEST:
                files[f"{name}/{file.name}"] = file.read_bytes()
    return files


def config_json(
    source: Mapping[str, Any],
    quantization: Mapping[str, Any] | None,
    *,
    untied: bool = False,
    headless: bool = False,
) -> bytes:
    """Write the source's config with another quantisation, or None.

    untied: the head has its own weights now.  headless: there is none, so that the class is that of the bare model.
    """
    config = {
        key: value
        for key, value in source.items()
        if key not in ("quantization_config", "compression_config", "quantization")
    }
    named = config.get("architectures")
    if headless and isinstance(named, list):
        config["architectures"] = [re.sub(r"For[A-Z]\w*$", "Model", str(name)) for name in named]
    if untied:
        config["tie_word_embeddings"] = False
        for name, inner in config.items():  # of the text model in a wrapper
            if isinstance(inner, Mapping) and inner.get("tie_word_embeddings"):
                config[name] = {**inner, "tie_word_embeddings": False}
    if quantization is not None:
        config["quantization_config"] = dict(quantization)
        if "quant_method" not in quantization:  # mlx-lm writes its settings twice, and reads the second place
            config["quantization"] = dict(quantization)
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def model_card(
    folder: Path,
    name: str,
    methods: Mapping[str, str],
    rules: Sequence[str],
    *,
    spelling: str,
    calibration: str | None,
    notes: Sequence[str],
    version: str,
) -> bytes:
    """Write the source's card, or a new one, with a section on the quantisation.

    folder, name: of the source.  methods: of the layers, by name.  rules: as lines.  notes: a paragraph each.
    """
    path = folder / CARD
    text = (
        path.read_text(encoding="utf-8", errors="replace").rstrip()
        if path.is_file()
        else f"# {name}, quantised"
    )
    counts = Counter(methods.values())
    table = "\n".join(f"| {count} | {method} |" for method, count in counts.most_common())
    lines = [
        text,
        "",
        "## Quantisation",
        "",
        f"Written by pymllm {version} from `{name}`, in the {spelling} spelling.",
        "",
        "| layers | stored as |",
        "| --- | --- |",
        table,
        "",
        "Rules, the first match decides:",
        "",
        "```",
        *rules,
        "```",
        "",
        f"Calibration: {calibration}."
        if calibration
        else "No calibration: weights were rounded by themselves.",
        *(f"\n{note}" for note in notes),
    ]
    return ("\n".join(lines) + "\n").encode()
