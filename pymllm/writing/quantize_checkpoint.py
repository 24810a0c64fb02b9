"""`quantize_checkpoint`: another checkpoint of the same model, quantised by rules, which other programs read too.

    pymllm.quantize_checkpoint("org/model", "model-int4", {"**.layers.**": "int4:scale=mse"})

The model is never loaded: each block is read, decoded to floats, encoded, written and freed before the next one. With
calibration text the blocks also run, in float32, over that text (`pymllm.writing.calibrated`).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pymllm.arguments import checked
from pymllm.config import DTYPES
from pymllm.disk import cannot_write, free_bytes, reading
from pymllm.errors import ConfigError, choices, nearest
from pymllm.loading.prepare import Prepared, prepare
from pymllm.models import gguf_architectures
from pymllm.parallel import Parallel
from pymllm.quantization.formats.awq import AWQLinearMethod
from pymllm.quantization.formats.gptq import GPTQLinearMethod
from pymllm.quantization.formats.mlx import MLXLinearMethod
from pymllm.quantization.formats.mxfp4 import MXFP4LinearMethod
from pymllm.quantization.formats.none import UnquantizedLinearMethod
from pymllm.quantization.rules import RuleSource, is_method_alone, read_rules
from pymllm.text.gguf_tokenizer import GGUFTokenizer, open_tokenizer
from pymllm.text.windows import read_windows
from pymllm.weights.checkpoint import Checkpoint
from pymllm.weights.memory import is_out_of_memory, out_of_memory
from pymllm.weights.opening import open_checkpoint, resolve_model_path
from pymllm.writing.awq import AWQSpelling
from pymllm.writing.calibrated import Calibration
from pymllm.writing.checkpoint_writer import CheckpointWriter, WrittenCheckpoint
from pymllm.writing.compressed_tensors import CompressedTensorsSpelling
from pymllm.writing.gguf import GGUFSpelling, GGUFWriter
from pymllm.writing.gptq import GPTQSpelling, GPTQv2Spelling
from pymllm.writing.mlx import MLXSpelling, MLXWriter
from pymllm.writing.modelopt import ModelOptSpelling
from pymllm.writing.mxfp4 import MODEL_TYPE, MXFP4Spelling, MXFP4Writer
from pymllm.writing.output import AGAIN
from pymllm.writing.shorthand import Expanded, expand
from pymllm.writing.spelling import Spelling

SPELLINGS: dict[str, type[Spelling]] = {
    spelling.name: spelling
    for spelling in (
        *(AWQSpelling, CompressedTensorsSpelling, GPTQSpelling, GPTQv2Spelling),
        *(ModelOptSpelling, MLXSpelling, MXFP4Spelling, GGUFSpelling),
    )
}
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", re.IGNORECASE)
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@checked()
def quantize_checkpoint(
    model: str | Path,
    out: str | Path,
    quant: RuleSource,
    *,
    format: str = "auto",
    shard_size: str | int = "5GB",
    calibrate: str | Path | None = None,
    algorithm: str = "auto",
    act_order: bool = False,
    calibration_tokens: int = 16384,
    window: int = 512,
    restart: bool = False,
    revision: str | None = None,
    progress: bool | None = None,
) -> WrittenCheckpoint:
    """Write a checkpoint anew, with its layers in the methods that rules name.

    model: a folder of config.json and safetensors files, a .gguf file, or a hub id "org/name", in any format that
    loading reads.
    out: the folder to write, which must be new or empty, or hold an unfinished run of the same request; or the .gguf
    file to write, which must be new.
    quant: rules, {"**.layers.**": "int4:scale=mse"} say; also a list of "PATTERN=METHOD" lines, or "@FILE". A layer
    without a rule keeps its weights. A method alone, "int4" or for a GGUF file "Q4_K_M", is for all layers of the
    model's blocks that no rule names.
    format: "awq", "gptq", "gptq_v2", "modelopt", "mlx", "mxfp4", "compressed-tensors", "gguf", or "auto": GGUF where
    `out` ends in .gguf, AWQ, GPTQ or MLX where all rules ask for it, MXFP4 where they do and the model is gpt-oss, else
    compressed-tensors.
    shard_size: of a weight file at most, "5GB" or a number of bytes.
    calibrate: a text file: integer weights are rounded by what this text makes of their inputs, and
    activations=static finds its scales; None: every weight is rounded by itself.
    algorithm: of calibration: "awq" searches input scales and ranges, "gptq" makes errors good by inputs that are not
    rounded yet, "auto" is awq for format awq, else gptq.
    act_order: whether gptq rounds the inputs that matter most first.
    calibration_tokens: how many tokens of the text are taken, in windows at even distances.
    window: how many tokens a window has.
    restart: whether to throw away what an unfinished run of another request left in `out`.
    revision: a branch, tag or commit of a hub id; None: its main branch.
    progress: whether to show a bar; None: on a terminal.

    A run that was stopped and is asked for again goes on where it was. Files appear in `out` once all are made.
    Raises RuleError, ConfigError (a weight that the format cannot hold, say) or CheckpointError.
    """
    folder = resolve_model_path(model, revision)
    rules = expand_rules(folder, out, quant).rules
    with Parallel():
        prepared = prepare(folder, rules, device="cpu", dtype=_model_dtype(folder), compute="exact")
    spelling = choose_spelling(format, prepared, Path(out))
    limit = parse_size(shard_size)
    calibration = None
    if calibrate is not None:
        chosen = ("awq" if spelling.name == "awq" else "gptq") if algorithm == "auto" else algorithm
        windows = read_windows(
            prepared.checkpoint, prepared.config, Path(calibrate), calibration_tokens, window
        )
        calibration = Calibration(windows, chosen, act_order, Path(calibrate).name)
    elif algorithm != "auto" or act_order:
        raise ConfigError(
            "algorithm and act order belong to calibration, and there is no text to calibrate with",
            code="needs-calibration",
            found=f"algorithm={algorithm}, act_order={act_order}",
            fix="Give it some: --calibrate FILE.",
        )
    with prepared.checkpoint, _faults_named(Path(out)):
        if isinstance(spelling, GGUFSpelling):
            writer: CheckpointWriter = GGUFWriter(prepared, spelling, calibration, _model_name(model))
        else:
            files = _tokenizer_files(prepared.checkpoint)
            own = {MLXSpelling: MLXWriter, MXFP4Spelling: MXFP4Writer}
            kind = own.get(type(spelling), CheckpointWriter)
            writer = kind(prepared, spelling, limit, calibration, files)
        request = writer.request(rules)
        _check_place(Path(out), folder, writer.estimated_bytes())
        with writer.output(Path(out), request, restart) as output:
            try:
                return writer.write(output, str(model), rules, progress)
            except KeyboardInterrupt as stop:
                stop.args = (writer.describe_stop(output),)
                raise


def expand_rules(
    model: str | Path, out: str | Path, quant: RuleSource, revision: str | None = None
) -> Expanded:
    """Read rules, and find those that a method alone among them stands for.

    model, out, quant, revision: as of `quantize_checkpoint`.  Returns the rules, and what to tell the user, or "".
    ConfigError for two methods alone, and what `pymllm.writing.shorthand.expand` refuses.
    """
    listed: Any = [quant] if isinstance(quant, str | Path) else quant
    if listed is None or isinstance(listed, Mapping):
        return Expanded([str(rule) for rule in read_rules(listed)], "")
    lines = list(listed)
    alone = [str(line) for line in lines if isinstance(line, str) and is_method_alone(line.strip())]
    rules = [str(rule) for rule in read_rules([line for line in lines if line not in alone])]
    if not alone:
        return Expanded(rules, "")
    if len(alone) > 1:
        raise ConfigError(
            "two methods are given without patterns",
            code="rule-syntax",
            expected="one method for the whole model, and a pattern before every other: PATTERN=METHOD",
            found=" and ".join(alone),
        )
    folder = resolve_model_path(model, revision)
    with Parallel():
        prepared = prepare(folder, device="cpu", dtype=_model_dtype(folder), compute="exact")
    with prepared.checkpoint:
        return expand(prepared, alone[0].strip(), rules, Path(out))


@contextlib.contextmanager
def _faults_named(out: Path) -> Iterator[None]:
    """Raise ConfigError or CheckpointError for what the system could not give: a file, or memory."""
    try:
        yield
    except OSError as error:
        named = Path(os.fsdecode(error.filename)) if isinstance(error.filename, (str, bytes)) else out
        if named == out or out in named.parents or out.name in named.name:
            raise cannot_write(named, error, again=AGAIN) from error
        with reading(named):
            raise
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory("quantising", error, fix=f"Free some memory. {AGAIN}") from error


def parse_size(size: str | int) -> int:
    """Read a number of bytes from "5GB", "300 MB" or a number.  ConfigError for anything else."""
    found = SIZE.fullmatch(str(size).strip())
    value = int(float(found[1]) * UNITS[found[2].upper()]) if found else 0
    if value < 1:
        raise ConfigError(
            "the shard size is no size", code="shard-size", expected="a size such as 5GB", found=str(size)
        )
    return value


def choose_spelling(name: str, prepared: Prepared, out: Path) -> Spelling:
    """Choose a spelling by its name.  ConfigError if it is unknown, or not one for a path like `out`.

    "auto": GGUF for a path that ends in .gguf, AWQ, GPTQ or MLX where no rule asks for anything else (gptq_v2 if some
    have zero points), MXFP4 likewise for gpt-oss.
    """
    file = out.suffix.lower() == ".gguf"
    if name == "auto":
        targets = [prepared.quant.targets[rule] for rule in prepared.quant.rules]
        asked = {type(target) for target in targets} - {UnquantizedLinearMethod}
        own: dict[type[Any], str] = {AWQLinearMethod: "awq", GPTQLinearMethod: "gptq", MLXLinearMethod: "mlx"}
        if prepared.config.raw["model_type"] == MODEL_TYPE:
            own[MXFP4LinearMethod] = "mxfp4"
        name = own.get(next(iter(asked)), "") if len(asked) == 1 else ""
        if name == "gptq" and not all(t.symmetric for t in targets if isinstance(t, GPTQLinearMethod)):
            name = "gptq_v2"  # GPTQModel reads zero points less one from its own files alone
        name = "gguf" if file else name or "compressed-tensors"
    if name not in SPELLINGS:
        raise ConfigError(
            "unknown format to write",
            code="spelling",
            expected="auto or " + choices(SPELLINGS, name),
            found=name,
            fix=nearest(str(name), SPELLINGS),
        )
    if (name == "gguf") is not file:
        raise ConfigError(
            "a GGUF model is one file, and every other format a folder",
            code="spelling",
            file=str(out),
            expected="a path that ends in .gguf" if name == "gguf" else f"a folder, for {name}",
            fix=f"Write to {out}.gguf." if name == "gguf" else "Ask for --format gguf, or name another path.",
        )
    return SPELLINGS[name]()


def _model_name(model: str | Path) -> str:
    """Name a model after its folder, its file or its id."""
    path = Path(model)
    return (
        (path.resolve().stem if path.suffix == ".gguf" else path.resolve().name)
        if path.exists()
        else path.name
    )


def _model_dtype(folder: Path) -> str:
    """Return the dtype that floats are written in: the one that the checkpoint says it was saved in."""
    config = open_checkpoint(folder, gguf_architectures()).config
    name = str(config.get("dtype", config.get("torch_dtype")))
    return name if name in DTYPES else "float32"


def _check_place(out: Path, source: Path, expected: int) -> None:
    """Refuse to write into the source, or where there is no room."""
    if out.exists() and out.resolve() == source.resolve():
        raise ConfigError(
            "the output folder is the source", code="out-exists", file=str(out), fix="Write to a new folder."
        )
    places = (
        out.absolute().parents if out.suffix.lower() == ".gguf" else (out.absolute(), *out.absolute().parents)
    )
    there = next(path for path in places if path.exists())
    if not there.is_dir():
        raise ConfigError(
            "the output would lie below this file",
            code="out-exists",
            file=str(there),
            fix="Write to a new folder.",
        )
    free = free_bytes(there)
    if free is not None and free < expected:
        raise ConfigError(
            "there is too little room for the output",
            code="disk-full",
            file=str(out),
            expected=f"about {expected / 1e9:.2f} GB, part of it for a while only",
            found=f"{free / 1e9:.2f} GB",
        )


def _tokenizer_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Write a GGUF file's tokenizer as the files that folders have; none where it has none that is known.

    Returns contents by name.
    """
    tokenizer = open_tokenizer(checkpoint)
    if not isinstance(tokenizer, GGUFTokenizer) or not tokenizer.available:
        return {}
    settings = {name: token for name, token in tokenizer.settings.items() if token is not None}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    files = {
        "tokenizer.json": tokenizer.encoder.tokenizer.to_str(pretty=True),  # type: ignore[attr-defined]
        "tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False) + "\n",
    }
    template = checkpoint.metadata.get("tokenizer.chat_template")
    if isinstance(template, str) and template:
        files["chat_template.jinja"] = template
    return {name: text.encode() for name, text in files.items()}
