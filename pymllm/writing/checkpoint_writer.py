"""One checkpoint's way to files: its steps are read, quantised, spelled, kept and put together.

What an interrupted run has made is found again (`output.py`); what a spelling cannot express is refused before any
weight is read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

import pymllm
from pymllm.disk import reading
from pymllm.errors import counted
from pymllm.kernels.canonical import CanonicalWeight, DenseWeight, Fp8Weight, IntWeight, relative_error
from pymllm.loading.prepare import Prepared
from pymllm.loading.progress import progress_bar
from pymllm.loading.stored import check_skipped
from pymllm.quantization.converted import ConvertedLinearMethod
from pymllm.quantization.formats.awq import AWQLinearMethod
from pymllm.quantization.formats.gguf import GGUFLinearMethod
from pymllm.quantization.formats.gptq import GPTQLinearMethod
from pymllm.quantization.formats.mlx import MLXLinearMethod
from pymllm.quantization.formats.modelopt import NVFP4LinearMethod
from pymllm.quantization.formats.mxfp4 import MXFP4LinearMethod
from pymllm.quantization.formats.none import UnquantizedLinearMethod
from pymllm.quantization.method import LinearMethodBase
from pymllm.quantization.rounding.calibrated import needs_inputs, without_static
from pymllm.quantization.storage.compressed_linear import (
    FloatQuantizedLinearMethod,
    Fp4LinearMethod,
    IntQuantizedLinearMethod,
)
from pymllm.quantization.storage.fp8_linear import NamedFp8LinearMethod
from pymllm.weights.memory import return_freed_memory
from pymllm.writing.calibrated import CalibratedModel, Calibration
from pymllm.writing.encoding import encode
from pymllm.writing.layers import SourceLayer, Step, kept_parts, steps_of
from pymllm.writing.output import Output, storable
from pymllm.writing.side_files import config_json, embedding_files, files_to_copy, model_card
from pymllm.writing.spelling import SpelledLayer, Spelling, WithSideConfigs

STORED = (
    *(UnquantizedLinearMethod, AWQLinearMethod, GPTQLinearMethod, NVFP4LinearMethod, NamedFp8LinearMethod),
    *(IntQuantizedLinearMethod, FloatQuantizedLinearMethod, Fp4LinearMethod, GGUFLinearMethod),
    *(MLXLinearMethod, MXFP4LinearMethod),
)


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
    """A checkpoint that `quantize_checkpoint` has written.

    path: its folder, or its file.  spelling: the format's name.  files: all that were written, by name.  source_bytes,
    written_bytes: of the tensors before, and of the weight files after.  resumed: how many steps an earlier run had
    finished.  notes: what a user should know besides.
    """

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


class CheckpointWriter:
    """The writer of one checkpoint, from a `Prepared` to files.

    shard_bytes: of a weight file.  calibration: None: every weight is rounded by itself.
    side_files: contents by name, beside the files that the source has.
    cuts_experts: whether each expert is written apart, also where the source has all in one tensor.
    ConfigError, from the start, for a layer that the spelling cannot express.
    """

    cuts_experts: ClassVar[bool] = False

    def __init__(
        self,
        prepared: Prepared,
        spelling: Spelling,
        shard_bytes: int,
        calibration: Calibration | None,
        side_files: Mapping[str, bytes],
    ) -> None:
        self.calibration, self.side_files = calibration, side_files
        self.prepared, self.spelling, self.shard_bytes = prepared, spelling, shard_bytes
        self.steps = steps_of(prepared, self.cuts_experts)
        self.scale_dtype = spelling.scale_dtype(prepared.execution.dtype)
        self._check()

    def request(self, rules: list[str]) -> dict[str, Any]:
        """Describe the run in JSON: two runs with an equal description write the same checkpoint."""
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
            planned = self.planned(layer)
            spelled[layer.name] = SpelledLayer(layer.kind, self.storage(layer, planned))
        self.spelling.config(self._named(spelled | self._left_alone(spelled)))

    def _named(self, layers: Mapping[str, SpelledLayer]) -> dict[str, SpelledLayer]:
        """Give layers the names that the source's class and its files have for them, for a config."""
        names = self.prepared.checkpoint.names
        first = 0 if self.prepared.config.wrapper is None else 1
        return {
            spelled: layer for name, layer in layers.items() for spelled in names.of(name)[first:] or (name,)
        }

    def storage(self, layer: SourceLayer, weight: CanonicalWeight) -> LinearMethodBase:
        """Choose the method that a layer's weight is stored in.  ConfigError if the spelling cannot express it."""
        return self.spelling.store(weight, layer.shape, layer.kind)

    def output(self, out: Path, request: Mapping[str, Any], restart: bool) -> Output:
        """Make the output that the checkpoint is written to."""
        return Output(out, request, restart=restart)

    def final(self, step: Step, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Turn a step's tensors, by their names in the model, into those that files hold."""
        stored_as = self.prepared.checkpoint.stored_as
        quantised = {layer.name for layer in self.layers() if layer.target is not None}
        found = {}
        for name, tensor in tensors.items():
            owner = stored_as.owner(name)
            if owner == name:
                found[stored_as.tensor(name)] = tensor
            elif owner.rpartition(".")[0] in quantised:  # else its owner's step writes it
                found[stored_as.own(name)] = tensor
        return found

    def keeps(self, layer: SourceLayer, weight: CanonicalWeight) -> bool:
        """Tell whether a layer's stored tensors are copied as they are: kept floats, each in its own dtype."""
        return layer.cut is None and layer.target is None and isinstance(weight, DenseWeight)

    def _left_alone(self, spelled: Mapping[str, SpelledLayer]) -> dict[str, SpelledLayer]:
        """List the matrices that no rule names, but other readers may take for layers: a tied head, a router."""
        names = [
            tensor.name.removesuffix(".weight")
            for step in self.steps
            for tensor in step.copied
            if tensor.name.endswith(".weight") and len(tensor.shape) == 2
        ]
        head, plain = self.prepared.model.lm_head, UnquantizedLinearMethod()
        found = {name: SpelledLayer("linear", plain) for name in names}
        if head is not None and head.prefix not in spelled:
            found[head.prefix] = SpelledLayer("lm_head", plain)
        return found

    def layers(self) -> Iterator[SourceLayer]:
        for step in self.steps:
            yield from step.layers

    def planned(self, layer: SourceLayer) -> CanonicalWeight:
        """Plan the weight that will be written, without data."""
        if layer.target is None:
            return layer.source.planned(layer.shape)
        target = layer.target if self.calibration is None else without_static(layer.target)
        planned = ConvertedLinearMethod(layer.source, target).planned(layer.shape)
        if isinstance(planned, IntWeight) and planned.offsets is not None and self.scale_dtype is not None:
            # Float zero points will be rounded: `storable_integers`.
            planned = replace(planned, offsets=None, zeros=planned.offsets.to(torch.uint8))
        if isinstance(planned, (IntWeight, Fp8Weight)) and needs_inputs(layer.target):
            planned = replace(planned, activations="static", input_scales=torch.empty(1, device="meta"))
        return planned

    def estimated_bytes(self) -> int:
        """Estimate the room on the disk: for the pieces, and for the one shard made while they still lie there."""
        total = sum(tensor.nbytes for step in self.steps for tensor in step.copied)
        for layer in self.layers():
            planned = self.planned(layer)
            packed = planned.codes.numel() * planned.bits // 8 if isinstance(planned, IntWeight) else 0
            total += packed + sum(t.nbytes for name, t in planned.tensors().items() if name != "codes")
        return total + min(total, self.shard_bytes)

    def write(self, output: Output, name: str, rules: list[str], progress: bool | None) -> WrittenCheckpoint:
        """Do what is still to be done in `output`: make the pieces, assemble them, add the side files, publish.

        name, rules: of the source and of the request, for the model card.  progress: whether to show a bar; None: on a
        terminal.
        """
        resumed = len(output.pieces)
        if not output.publishing:
            if not output.assembling:
                self._make_pieces(output, progress)
            if output.assembling:
                notes = output.assembly_notes()
            else:
                pieces = [output.pieces[step.name] for step in self.steps]
                notes = {layer: note for piece in pieces for layer, note in piece.notes.items()}
            output.assemble([step.name for step in self.steps], self.shard_bytes, notes)
            self.add_side_files(output, name, rules, notes)
        notes = output.assembly_notes()
        files = output.publish()
        written = sum(
            (output.folder / file).stat().st_size
            for file in files
            if file.endswith((".safetensors", ".gguf"))
        )
        layers = [
            WrittenLayer(layer, note["kind"], note["describe"], note["source"], note["rule"], note["error"])
            for layer, note in notes.items()
        ]
        source = sum(tensor.nbytes for tensor in self.prepared.checkpoint.tensors.values())
        return WrittenCheckpoint(
            str(output.path),
            self.spelling.name,
            files,
            layers,
            source,
            written,
            resumed,
            self._notes(notes),
        )

    def describe_stop(self, output: Output) -> str:
        """Say how far a run came that was stopped, and how to go on."""
        done = sum(step.name in output.pieces for step in self.steps)
        part = f"{done} of {counted(len(self.steps), 'block')} and other parts are done"
        if output.assembling or output.publishing:
            part = "all parts are done, and are being put together"
        return (
            f"Stopped: {part} and kept in {output.staging}. The same command goes on from there; with --restart it "
            "begins anew."
        )

    def _make_pieces(self, output: Output, progress: bool | None) -> None:
        check_skipped(self.prepared.skipped)
        make = self._make if self.calibration is None else self._calibrated(output, self.calibration)
        total = sum(step.nbytes for step in self.steps)  # of the source
        with progress_bar("Quantising", total, progress) as advance:
            for step in self.steps:
                advance.at(step.name)
                if step.name not in output.pieces:
                    tensors, notes = make(step)
                    output.add(step.name, self.final(step, tensors), notes)
                    del tensors
                    return_freed_memory()
                advance(step.nbytes)

    def _make(self, step: Step) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Make a step's tensors as they are written, and a note on each of its layers."""
        tensors = step.read_copied()
        notes = {}
        for layer in step.layers:
            weight = layer.read()
            if layer.target is None:
                made, error = weight, 0.0
            else:
                floats = layer.decode(weight)
                made = encode(layer.target, floats, layer.shape, self.scale_dtype)
                error = relative_error(made.dequantize(torch.float32), floats)
            stored, notes[layer.name] = self.store(layer, made, error)
            tensors |= stored
        return tensors, notes

    def _calibrated(
        self, output: Output, calibration: Calibration
    ) -> Callable[[Step], tuple[dict[str, Tensor], dict[str, Any]]]:
        """Make what `_make` is for a model that also runs; it goes on behind the last step whose output was kept."""
        model = CalibratedModel(self.prepared, calibration, self.scale_dtype)
        names = [step.name for step in self.steps]
        state = output.load_state()
        if state is None:
            output.forget_after([])
        else:
            tensors, last = state
            model.floats.hidden = tensors["hidden"]
            output.forget_after(names[: names.index(last) + 1])

        def make(step: Step) -> tuple[dict[str, Tensor], dict[str, Any]]:
            previous = names[names.index(step.name) - 1]
            if model.floats.hidden is not None and previous in output.pieces:
                output.save_state({"hidden": model.floats.hidden}, previous)
            made, changed = model.make(step)
            tensors = step.read_copied() | changed
            notes = {}
            for done in made:
                stored, note = self.store(done.layer, done.weight, done.error)
                notes[done.layer.name] = {**note, "unreached": done.unreached}
                tensors |= stored
            return tensors, notes

        return make

    def store(
        self, layer: SourceLayer, weight: CanonicalWeight, error: float
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Spell a layer: return its tensors by their names in the checkpoint, and a note on it, which is JSON.

        error: relative distance of `weight` to the source's.  ConfigError if the spelling cannot express the weight.
        """
        method = self.storage(layer, weight)
        if self.keeps(layer, weight):
            stored = {place.slot.spec.name: place.tensor.read() for place in layer.placements}
        else:
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

    def add_side_files(self, output: Output, name: str, rules: list[str], notes: Mapping[str, Any]) -> None:
        """Add what lies beside the weights: config.json, the tokenizer's files, the model card, licences."""
        checkpoint = self.prepared.checkpoint
        spelled = {
            layer: SpelledLayer(note["kind"], _from_json(note["method"])) for layer, note in notes.items()
        }
        quantised = any(not isinstance(s.method, UnquantizedLinearMethod) for s in spelled.values())
        quantization = (
            self.spelling.config(self._named(spelled | self._left_alone(spelled))) if quantised else None
        )
        head = self.prepared.model.lm_head
        tied = (
            self.prepared.config.tie_word_embeddings
            or self.prepared.config.head_names[0] in self.prepared.quant.sources
        )
        untied = head is not None and tied and head.prefix in notes
        for path in files_to_copy(checkpoint.path):
            with reading(path):
                content = path.read_bytes()
            output.add_file(path.name, content)
        for file, content in embedding_files(checkpoint.path).items():
            output.add_file(file, content)
        for file, content in self.side_files.items():
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
        if quantization is not None and isinstance(self.spelling, WithSideConfigs):
            for file, settings in self.spelling.side_configs(quantization).items():
                output.add_file(file, (json.dumps(settings, indent=2) + "\n").encode())
        config = config_json(checkpoint.config, quantization, untied=untied, headless=head is None)
        output.add_file("config.json", config)

    def _notes(self, notes: Mapping[str, Any]) -> list[str]:
        """Say what a user should know besides.  notes: on every layer, by name."""
        head = self.prepared.model.lm_head
        found = []
        if head is not None and self.prepared.config.tie_word_embeddings and head.prefix in notes:
            found.append(f"{head.prefix} was tied to the embedding and has weights of its own now.")
        elif head is not None and head.prefix in self.prepared.quant.sources:
            found.append(
                f"{head.prefix} has weights of its own in the source too, whose config ties it to the embedding."
            )
        unreached = [layer for layer, note in notes.items() if note.get("unreached")]
        if unreached:
            found.append(
                counted(len(unreached), "layer was", "layers were")
                + " rounded without calibration, as no input of it was seen there: "
                f"{unreached[0]}."
            )
        kept = {tensor.name for tensor in kept_parts(self.prepared)}
        dropped = Counter(record.reason for record in self.prepared.records if record.name not in kept)
        found += [
            f"{counted(count, 'tensor was', 'tensors were')} not carried over: {reason}."
            for reason, count in dropped.items()
        ]
        return found


def _digest_of(calibration: Calibration) -> str:
    ids = hashlib.blake2b(repr(calibration.windows).encode(), digest_size=16).hexdigest()
    return f"{calibration.describe()}, {ids}"


def _as_json(method: LinearMethodBase) -> dict[str, Any]:
    """Write a storage method as JSON, for a note that another run may read back with `_from_json`."""
    fields = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}  # type: ignore[arg-type]
    values = {
        name: f"dtype:{str(v).removeprefix('torch.')}" if isinstance(v, torch.dtype) else v
        for name, v in fields.items()
    }
    return {"class": type(method).__name__, **values}


def _from_json(values: Mapping[str, Any]) -> LinearMethodBase:
    (cls,) = (cls for cls in STORED if cls.__name__ == values["class"])
    fields = {name: _field(value) for name, value in values.items() if name != "class"}
    return cls(**fields)


def _field(value: Any) -> Any:
    if isinstance(value, str) and value.startswith("dtype:"):
        return getattr(torch, value.removeprefix("dtype:"))
    return tuple(value) if isinstance(value, list) else value
