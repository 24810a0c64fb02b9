"""`quantize_checkpoint`: another checkpoint of the same model, quantised by rules, that other programs read too.

    pymllm.quantize_checkpoint("org/model", "model-int4", {"**.layers.**": "int4:scale=mse"})

The model is never loaded: each block is read, decoded to floats, encoded, written and freed before the next one. With
calibration text the blocks also run, in float32, over that text (`pymllm.writing.calibrated`).
"""

# O out_features, I in_features

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pymllm
from pymllm.config import DTYPES
from pymllm.engine.gguf_tokenizer import GGUFTokenizer, open_tokenizer
from pymllm.errors import ConfigError
from pymllm.kernels.canonical import CanonicalWeight, DenseWeight, Fp8Weight, IntWeight
from pymllm.parallel import Parallel
from pymllm.preparation import Prepared, prepare
from pymllm.quantization.base import ConvertedLinearMethod, LinearMethodBase, UnquantizedLinearMethod
from pymllm.quantization.calibration import needs_inputs, without_static
from pymllm.quantization.compressed_linear import FloatQuantizedLinearMethod, IntQuantizedLinearMethod
from pymllm.quantization.formats.awq import AWQLinearMethod
from pymllm.quantization.rules import RuleSource, read_rules
from pymllm.text_windows import read_windows
from pymllm.weights.checkpoint import Checkpoint, resolve_model_path
from pymllm.weights.memory import return_freed_memory
from pymllm.writing.awq import AWQSpelling
from pymllm.writing.calibrated import CalibratedModel, Calibration
from pymllm.writing.compressed_tensors import CompressedTensorsSpelling
from pymllm.writing.encoding import encode
from pymllm.writing.layers import SourceLayer, Step, steps_of
from pymllm.writing.output import Output, storable
from pymllm.writing.side_files import config_json, files_to_copy, model_card
from pymllm.writing.spelling import SpelledLayer, Spelling

SPELLINGS: dict[str, type[Spelling]] = {
    spelling.name: spelling for spelling in (AWQSpelling, CompressedTensorsSpelling)
}
STORED = (UnquantizedLinearMethod, AWQLinearMethod, IntQuantizedLinearMethod, FloatQuantizedLinearMethod)
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", re.IGNORECASE)
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass(frozen=True)
class WrittenLayer:
    """One layer that was written.

    method: how it is stored.  source_method: how it was.  error: relative distance of the weight to the source's.
    """

    prefix: str
    kind: str
    method: str
    source_method: str
    rule: str | None
    error: float


@dataclass(frozen=True)
class WrittenCheckpoint:
    """What `quantize_checkpoint` made.  resumed: steps that an earlier run had finished."""

    path: str
    spelling: str
    files: list[str]
    layers: list[WrittenLayer]
    source_bytes: int
    written_bytes: int
    resumed: int
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        return {"schema_version": 1, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        counts = Counter(layer.method for layer in self.layers)
        methods = "\n".join(f"  {count:4d} x {method}" for method, count in counts.most_common())
        return (
            f"{self.path}: {self.written_bytes / 1e6:.1f} MB of weights ({self.spelling}), "
            f"from {self.source_bytes / 1e6:.1f} MB\n{methods}"
            + "".join(f"\n  note: {n}" for n in self.notes)
        )


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
    """Write `model` to the folder `out`, its layers in the methods that the rules `quant` name.

    model: a folder or hub id, in any format that loading reads.  A layer without a rule keeps its weights.
    format: "awq", "compressed-tensors", or "auto": AWQ where all rules ask for it, else compressed-tensors.
    shard_size: of a weight file, "5GB" or bytes.
    calibrate: a text file.  Integer weights are then rounded by what this text makes of their inputs, and
    activations=static finds its scales.  algorithm: "awq" (searches of input scales and of ranges), "gptq" (errors made
    good by inputs not rounded yet; act_order: those that matter most first), "auto": awq for format awq, else gptq.
    calibration_tokens: how many are taken, in windows of `window` at even distances.
    restart: throw away what an unfinished run of another request left in `out`.

    A run that was stopped and is asked for again goes on where it was. Files appear in `out` once all are made.
    Raises RuleError, ConfigError (a weight that the format cannot hold, say) or CheckpointError.
    """
    folder = resolve_model_path(model, revision)
    rules = read_rules(quant)
    with Parallel():
        prepared = prepare(
            folder, rules_as_lines(rules), device="cpu", dtype=_model_dtype(folder), compute="exact"
        )
    spelling = choose_spelling(format, prepared)
    limit = parse_size(shard_size)
    calibration = None
    if calibrate is not None:
        chosen = ("awq" if spelling.name == "awq" else "gptq") if algorithm == "auto" else algorithm
        windows = read_windows(prepared, Path(calibrate), calibration_tokens, window)
        calibration = Calibration(windows, chosen, act_order, Path(calibrate).name)
    elif algorithm != "auto" or act_order:
        raise ConfigError(
            "an algorithm that looks at inputs needs calibration text",
            code="needs-calibration",
            found=algorithm,
            fix="Give it some: --calibrate FILE.",
        )
    with prepared.checkpoint:
        writer = _Writer(prepared, spelling, limit, calibration)
        request = writer.request(rules_as_lines(rules))
        _check_place(Path(out), folder, writer.estimated_bytes())
        with Output(Path(out), request, restart=restart) as output:
            return writer.write(output, str(model), rules_as_lines(rules), progress)


def rules_as_lines(rules: Any) -> list[str]:
    return [str(rule) for rule in rules]


def parse_size(size: str | int) -> int:
    """Bytes of "5GB", "300 MB" or a number.  ConfigError for anything else."""
    found = SIZE.fullmatch(str(size).strip())
    value = int(float(found[1]) * UNITS[found[2].upper()]) if found else 0
    if value < 1:
        raise ConfigError(
            "the shard size cannot be read", code="shard-size", expected="a size such as 5GB", found=str(size)
        )
    return value


def choose_spelling(name: str, prepared: Prepared) -> Spelling:
    """By name; "auto": AWQ where no rule asks for anything else."""
    if name == "auto":
        targets = [prepared.quant.targets[rule] for rule in prepared.quant.rules]
        only_awq = any(isinstance(target, AWQLinearMethod) for target in targets) and all(
            isinstance(target, (AWQLinearMethod, UnquantizedLinearMethod)) for target in targets
        )
        name = "awq" if only_awq else "compressed-tensors"
    if name not in SPELLINGS:
        raise ConfigError(
            "unknown format to write",
            code="spelling",
            expected="auto or " + " or ".join(SPELLINGS),
            found=name,
        )
    return SPELLINGS[name]()


def _model_dtype(folder: Path) -> str:
    """What floats are written in: the dtype that the checkpoint says it was saved in."""
    config = Checkpoint.open(folder).config
    name = str(config.get("dtype", config.get("torch_dtype")))
    return name if name in DTYPES else "float32"


def _check_place(out: Path, source: Path, expected: int) -> None:
    """Refuse to write into the source, or where there is no room."""
    if out.exists() and out.resolve() == source.resolve():
        raise ConfigError("the output folder is the source", code="out-exists", file=str(out))
    there = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ConfigError("the output lies below a file", code="out-exists", file=str(there))
    free = shutil.disk_usage(there).free
    if free < expected:
        raise ConfigError(
            "there is too little room for the output",
            code="disk-full",
            file=str(out),
            expected=f"about {expected / 1e9:.2f} GB, part of it for a while only",
            found=f"{free / 1e9:.2f} GB",
        )


class _Writer:
    """One checkpoint's way from a `Prepared` to files."""

    def __init__(
        self, prepared: Prepared, spelling: Spelling, shard_bytes: int, calibration: Calibration | None
    ) -> None:
        self.calibration = calibration
        self.prepared, self.spelling, self.shard_bytes = prepared, spelling, shard_bytes
        self.steps = steps_of(prepared)
        self.scale_dtype = spelling.scale_dtype(prepared.execution.dtype)
        self._check()

    def request(self, rules: list[str]) -> dict[str, Any]:
        """What makes two runs the same, as JSON."""
        checkpoint = self.prepared.checkpoint
        files = {
            file.path.name: [file.path.stat().st_size, file.path.stat().st_mtime_ns]
            for file in checkpoint.files
        }
        config = hashlib.blake2b(repr(sorted(checkpoint.config.items())).encode(), digest_size=16)
        return {
            "pymllm": pymllm.__version__,
            "model": str(checkpoint.path.resolve()),
            "model files": files,
            "model config": config.hexdigest(),
            "rules": rules,
            "format": self.spelling.name,
            "shard size": self.shard_bytes,
            "calibration": None if self.calibration is None else _digest_of(self.calibration),
        }

    def _check(self) -> None:
        """Find what the spelling cannot express before any weight is read, from weights without data."""
        spelled = {}
        for layer in self.layers():
            planned = self._planned(layer)
            spelled[layer.name] = SpelledLayer(
                layer.kind, self.spelling.store(planned, layer.shape, layer.kind)
            )
        self.spelling.config(spelled | self._left_alone(spelled))

    def _left_alone(self, spelled: Mapping[str, SpelledLayer]) -> dict[str, SpelledLayer]:
        """Matrices that no rule can name, but that other readers may take for layers: a tied head, a router."""
        names = [
            tensor.name.removesuffix(".weight")
            for step in self.steps
            for tensor in step.copied
            if tensor.name.endswith(".weight") and len(tensor.shape) == 2
        ]
        head = self.prepared.model.lm_head.prefix
        plain = UnquantizedLinearMethod()
        found = {name: SpelledLayer("linear", plain) for name in names}
        return found if head in spelled else found | {head: SpelledLayer("lm_head", plain)}

    def layers(self) -> Iterator[SourceLayer]:
        for step in self.steps:
            yield from step.layers

    def _planned(self, layer: SourceLayer) -> CanonicalWeight:
        """The weight that will be written, without data."""
        if layer.target is None:
            return layer.source.planned(layer.shape)
        target = layer.target if self.calibration is None else without_static(layer.target)
        planned = ConvertedLinearMethod(layer.source, target).planned(layer.shape)
        if isinstance(planned, IntWeight) and planned.offsets is not None:  # zero points will be rounded
            planned = replace(planned, offsets=None, zeros=planned.offsets.to(torch.uint8))
        if isinstance(planned, (IntWeight, Fp8Weight)) and needs_inputs(layer.target):
            planned = replace(planned, activations="static", input_scales=torch.empty(1, device="meta"))
        return planned

    def estimated_bytes(self) -> int:
        """Of the pieces, and of the one shard that is put together while they still lie there."""
        total = sum(tensor.nbytes for step in self.steps for tensor in step.copied)
        for layer in self.layers():
            planned = self._planned(layer)
            packed = planned.codes.numel() * planned.bits // 8 if isinstance(planned, IntWeight) else 0
            total += packed + sum(t.nbytes for name, t in planned.tensors().items() if name != "codes")
        return total + min(total, self.shard_bytes)

    def write(self, output: Output, name: str, rules: list[str], progress: bool | None) -> WrittenCheckpoint:
        resumed = len(output.pieces)
        if not output.publishing:
            if not output.assembling:
                self._make_pieces(output, progress)
            notes = (
                output.assembly_notes()
                if output.assembling
                else {
                    name: note for step in self.steps for name, note in output.pieces[step.name].notes.items()
                }
            )
            output.assemble([step.name for step in self.steps], self.shard_bytes, notes)
            self._add_side_files(output, name, rules, notes)
        notes = output.assembly_notes()
        files = output.publish()
        written = sum(
            (output.folder / file).stat().st_size for file in files if file.endswith(".safetensors")
        )
        layers = [
            WrittenLayer(layer, note["kind"], note["describe"], note["source"], note["rule"], note["error"])
            for layer, note in notes.items()
        ]
        source = sum(tensor.nbytes for tensor in self.prepared.checkpoint.tensors.values())
        return WrittenCheckpoint(
            str(output.folder),
            self.spelling.name,
            files,
            layers,
            source,
            written,
            resumed,
            self._notes(notes),
        )

    def _make_pieces(self, output: Output, progress: bool | None) -> None:
        make = self._make if self.calibration is None else self._calibrated(output, self.calibration)
        with _progress_bar(sum(step.nbytes for step in self.steps), progress) as advance:
            for step in self.steps:
                if step.name not in output.pieces:
                    tensors, notes = make(step)
                    output.add(step.name, tensors, notes)
                    del tensors
                    return_freed_memory()
                advance(step.nbytes)

    def _make(self, step: Step) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """A step's tensors as they are written, and a note on each of its layers."""
        tensors = {info.name: info.read() for info in step.copied}
        notes = {}
        for layer in step.layers:
            weight = layer.read()
            if layer.target is None:
                made, error = weight, 0.0
            else:
                floats = layer.decode(weight)
                made = encode(layer.target, floats, layer.shape, self.scale_dtype)
                error = relative_error(made, floats)
            stored, notes[layer.name] = self.store(layer, made, error)
            tensors |= stored
        return tensors, notes

    def _calibrated(
        self, output: Output, calibration: Calibration
    ) -> Callable[[Step], tuple[dict[str, Tensor], dict[str, Any]]]:
        """As `_make`, for a model that also runs; it goes on behind the last step whose output was kept."""
        model = CalibratedModel(self.prepared, calibration, self.scale_dtype)
        names = [step.name for step in self.steps]
        state = output.load_state()
        if state is None:
            output.forget_after([])
        else:
            tensors, last = state
            model.hidden = tensors["hidden"]
            output.forget_after(names[: names.index(last) + 1])

        def make(step: Step) -> tuple[dict[str, Tensor], dict[str, Any]]:
            previous = names[names.index(step.name) - 1]
            if model.hidden is not None and previous in output.pieces:
                output.save_state({"hidden": model.hidden}, previous)
            made, changed = model.make(step)
            tensors = {info.name: info.read() for info in step.copied} | changed
            notes = {}
            for done in made:
                unreached = done.layer.name in model.unreached
                stored, note = self.store(done.layer, done.weight, done.error)
                notes[done.layer.name] = {**note, "unreached": unreached}
                tensors |= stored
            return tensors, notes

        return make

    def store(
        self, layer: SourceLayer, weight: CanonicalWeight, error: float
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """A layer's tensors by their names in the checkpoint, and its note."""
        if layer.target is None and isinstance(weight, DenseWeight):  # as it is, in its own dtype
            (placement,) = layer.placements
            stored = {"weight": placement.tensor.read()}
            method: LinearMethodBase = UnquantizedLinearMethod()
        else:
            method = self.spelling.store(weight, layer.shape, layer.kind)
            stored = method.to_stored(weight, layer.shape)
        note = {
            "kind": layer.kind,
            "method": _as_json(method),
            "describe": method.describe(),
            "source": layer.source.describe(),
            "rule": None if layer.rule is None else str(layer.rule),
            "error": error,
        }
        return {f"{layer.name}.{suffix}": storable(tensor) for suffix, tensor in stored.items()}, note

    def _add_side_files(self, output: Output, name: str, rules: list[str], notes: Mapping[str, Any]) -> None:
        checkpoint = self.prepared.checkpoint
        spelled = {
            layer: SpelledLayer(note["kind"], _from_json(note["method"])) for layer, note in notes.items()
        }
        quantised = any(not isinstance(s.method, UnquantizedLinearMethod) for s in spelled.values())
        quantization = self.spelling.config(spelled | self._left_alone(spelled)) if quantised else None
        tied = self.prepared.config.tie_word_embeddings
        untied = tied and self.prepared.model.lm_head.prefix in notes
        for path in files_to_copy(checkpoint.path):
            output.add_file(path.name, path.read_bytes())
        for file, content in _tokenizer_files(checkpoint).items():
            output.add_file(file, content)
        card = model_card(
            checkpoint.path,
            Path(name).name if Path(name).exists() else name,
            {layer: note["describe"] for layer, note in notes.items()},
            rules,
            spelling=self.spelling.name,
            calibration=None if self.calibration is None else self.calibration.describe(),
            notes=self._notes(notes),
            version=pymllm.__version__,
        )
        output.add_file("README.md", card)
        output.add_file("config.json", config_json(checkpoint.config, quantization, untied=untied))

    def _notes(self, notes: Mapping[str, Any]) -> list[str]:
        head = self.prepared.model.lm_head
        found = []
        if self.prepared.config.tie_word_embeddings and head.prefix in notes:
            found.append(f"{head.prefix} was tied to the embedding and has weights of its own now.")
        unreached = [layer for layer, note in notes.items() if note.get("unreached")]
        if unreached:
            found.append(
                f"{len(unreached)} layers were rounded by themselves, as no calibration input was seen at them: "
                f"{unreached[0]}."
            )
        dropped = Counter(record.reason for record in self.prepared.records)
        found += [f"{count} tensors were not carried over: {reason}." for reason, count in dropped.items()]
        return found


def _tokenizer_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """A GGUF file's tokenizer as the files that folders have; nothing where it has none that is known."""
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


def _digest_of(calibration: Calibration) -> str:
    ids = hashlib.blake2b(repr(calibration.windows).encode(), digest_size=16).hexdigest()
    return f"{calibration.describe()}, {ids}"


def relative_error(weight: CanonicalWeight, floats: Tensor) -> float:
    """|weight - floats| / |floats|, Frobenius."""
    norm = float(floats.norm())
    return float((weight.dequantize(torch.float32) - floats).norm()) / (norm or 1.0)


def _as_json(method: LinearMethodBase) -> dict[str, Any]:
    fields = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}  # type: ignore[arg-type]
    values = {
        name: f"dtype:{str(v).removeprefix('torch.')}" if isinstance(v, torch.dtype) else v
        for name, v in fields.items()
    }
    return {"class": type(method).__name__, **values}


def _from_json(values: Mapping[str, Any]) -> LinearMethodBase:
    (cls,) = (cls for cls in STORED if cls.__name__ == values["class"])
    fields: dict[str, Any] = {}
    for name, value in values.items():
        if name != "class":
            is_dtype = isinstance(value, str) and value.startswith("dtype:")
            fields[name] = (
                getattr(torch, value[6:]) if is_dtype else tuple(value) if isinstance(value, list) else value
            )
    return cls(**fields)


@contextlib.contextmanager
def _progress_bar(total: int, progress: bool | None) -> Iterator[Callable[[int], Any]]:
    """A bar over the source's bytes, on a terminal; nothing elsewhere."""
    if not (sys.stderr.isatty() if progress is None else progress):
        yield lambda nbytes: None
        return
    from tqdm import tqdm

    with tqdm(total=total, unit="B", unit_scale=True, desc="Quantising", leave=False) as bar:
        yield bar.update
