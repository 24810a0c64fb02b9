"""The GGUF spelling: a model as one file that llama.cpp runs, with its settings and its tokenizer.

Blocks hold what `gguf:type=...` makes, and integers of other formats where a block type says them exactly: symmetric 4,
5 or 8 bits in groups of 32 or more with scales in float16, and MXFP4. Norms, biases and routers are in float32, other
floats in their own dtype. Tensors of a GGUF source that no rule names are copied, block for block.
The layouts: quantization/gguf/README.md.
"""

from __future__ import annotations

import hashlib
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pymllm.errors import ConfigError
from pymllm.kernels.canonical import CanonicalWeight, CodebookWeight, DenseWeight, IntWeight
from pymllm.loading.prepare import Prepared
from pymllm.quantization.formats.gguf import FLOAT_KINDS, GGUFLinearMethod
from pymllm.quantization.formats.none import UnquantizedLinearMethod
from pymllm.quantization.method import LinearMethodBase
from pymllm.quantization.storage.fp4_linear import fp4_kind
from pymllm.quantization.storage.gguf_blocks import BLOCKS
from pymllm.quantization.storage.gguf_pack import PACKERS, plain_integers
from pymllm.text.tokenizer import Tokenizer
from pymllm.weights.gguf_architecture import Interleaved
from pymllm.weights.gguf_file import GGUFFile
from pymllm.weights.spec import LinearShape
from pymllm.weights.tensor_file import TensorInfo
from pymllm.writing.calibrated import Calibration
from pymllm.writing.checkpoint_writer import CheckpointWriter
from pymllm.writing.gguf_container import FileTensor, encoded_metadata, header, padded
from pymllm.writing.gguf_settings import check_settings, find_architecture, write_settings
from pymllm.writing.gguf_vocabulary import write_vocabulary
from pymllm.writing.layers import SourceLayer, Step
from pymllm.writing.output import Output
from pymllm.writing.safetensors_container import chunks_of
from pymllm.writing.single_file import SingleFileOutput
from pymllm.writing.spelling import SpelledLayer, cannot_express

# general.file_type, by the type that most bytes of matrices have; llama.cpp shows it.
FILE_TYPES = {
    **{"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 12},
    **{"Q4_K": 15, "Q5_K": 17, "Q6_K": 18, "BF16": 32, "MXFP4": 38},
}
GUESSED = 1024  # the bit that leaves the type to the reader
DTYPE_NAMES = {dtype: name for name, dtype in FLOAT_KINDS.items()}
NOT_COPIED = ("general.file_type", "general.quantization_version", "general.alignment", "split.")


class GGUFSpelling:
    """The spelling of a GGUF file."""

    name = "gguf"

    def store(self, weight: CanonicalWeight, shape: LinearShape, kind: str) -> LinearMethodBase:
        """Choose the block type that holds exactly this weight.  ConfigError if there is none."""
        if isinstance(weight, DenseWeight):
            return UnquantizedLinearMethod()
        found = [name for name in PACKERS if _may_hold(name, weight, shape)]
        if isinstance(weight, IntWeight):
            # Of types with equal codes, the one that makes such scales.
            found.sort(key=lambda name: BLOCKS[name].scales is not weight.scales.dtype)
        if not found:
            raise cannot_express(
                self.name,
                shape,
                f"{weight.type} of {shape.in_features} inputs",
                expected="what gguf:type=... makes, mxfp4, or symmetric 4, 5 or 8 bits in groups of 32 or more",
                fix=f"Quantise it anew ({shape.name}=gguf:type=Q4_K), or keep it in floats ({shape.name}=none).",
            )
        return GGUFLinearMethod(found[0])

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype | None:
        """Return None: blocks hold what methods make of them."""
        return None

    def config(self, layers: Mapping[str, SpelledLayer]) -> dict[str, Any]:
        """Return nothing: a file has a type for each tensor instead."""
        return {}


def _may_hold(name: str, weight: CanonicalWeight, shape: LinearShape) -> bool:
    """Tell whether a block type can hold weights like this, as far as that shows without its scales' values."""
    block = BLOCKS[name]
    if isinstance(weight, CodebookWeight):
        return name == "MXFP4" and fp4_kind(weight) == "mxfp4" and weight.activations == "float"
    if not isinstance(weight, IntWeight):
        return False
    fits = weight.group_size % block.group == 0 and shape.in_features % block.values == 0
    return fits and plain_integers(weight, name)


class GGUFWriter(CheckpointWriter):
    """The writer of a GGUF file.

    name: the model's, for the file.  architecture, known: its name in files, and what a definition says of them.
    tensors: of the file, in its order, by name.
    """

    cuts_experts = True

    def __init__(
        self, prepared: Prepared, spelling: GGUFSpelling, calibration: Calibration | None, name: str
    ) -> None:
        self.architecture, self.known = find_architecture(prepared.config)
        super().__init__(prepared, spelling, sys.maxsize, calibration, {})
        config, checkpoint = prepared.config, prepared.checkpoint
        settings, self.factors = write_settings(
            self.architecture, self.known, config, config.size("vocab_size")
        )
        self.tensors = self._plan()
        quantised = [tensor for tensor in self.tensors.values() if len(tensor.shape) > 1]
        bytes_of: Counter[str] = Counter()
        for tensor in quantised:
            bytes_of[tensor.type] += tensor.nbytes
        general = {
            "general.architecture": self.architecture,
            "general.type": "model",
            "general.name": name,
            "general.quantization_version": 2,
            "general.file_type": FILE_TYPES.get(max(bytes_of, key=lambda kind: bytes_of[kind]), GUESSED),
        }
        check_settings(self.architecture, self.known, config, settings, self.tensors, self.factors)
        if isinstance(checkpoint.files[0], GGUFFile):
            # Its own words, which may say more than ours.
            entries = encoded_metadata(checkpoint.files[0].path, checkpoint.files[0].spans).items()
            metadata = {**general, **{key: v for key, v in entries if not key.startswith(NOT_COPIED)}}
        else:
            vocabulary = write_vocabulary(
                Tokenizer(checkpoint.path), config.size("vocab_size"), checkpoint.config
            )
            metadata = {**general, **settings, **vocabulary}
        self.header = header(metadata, list(self.tensors.values()))

    def request(self, rules: list[str]) -> dict[str, Any]:
        return {**super().request(rules), "header": hashlib.blake2b(self.header, digest_size=16).hexdigest()}

    def storage(self, layer: SourceLayer, weight: CanonicalWeight) -> LinearMethodBase:
        if layer.target is None and isinstance(layer.source, GGUFLinearMethod):
            return layer.source
        return super().storage(layer, weight)

    def keeps(self, layer: SourceLayer, weight: CanonicalWeight) -> bool:
        blocks = layer.target is None and isinstance(layer.source, GGUFLinearMethod)
        return blocks or super().keeps(layer, weight)

    def output(self, out: Path, request: Mapping[str, Any], restart: bool) -> Output:
        return SingleFileOutput(out, request, self._content, restart=restart)

    def estimated_bytes(self) -> int:
        """Estimate the room on the disk: for the pieces, and for the file made while they still lie there."""
        return len(self.header) + 2 * sum(tensor.padded for tensor in self.tensors.values())

    def add_side_files(self, output: Output, name: str, rules: list[str], notes: Mapping[str, Any]) -> None:
        """Add nothing: the file has all of it."""

    def final(self, step: Step, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Give a step's tensors the names, the order of rows, the offsets and the dtypes of the file."""
        found: dict[str, Tensor] = {}
        experts: dict[str, dict[int, Tensor]] = defaultdict(dict)
        for name, tensor in tensors.items():
            own, expert = self._file_name(name)
            dtype = FLOAT_KINDS.get(self.tensors[own].type)
            value = tensor if dtype is None else tensor.to(dtype)
            change = self._change(name)
            if change is not None and (dtype is not None or isinstance(change, Interleaved)):
                value = change.stored(value)
            if expert is None:
                found[own] = value.reshape(self.tensors[own].shape) if dtype is not None else value
            else:
                experts[own][expert] = value
        for own, by_index in experts.items():
            found[own] = torch.stack([by_index[index] for index in range(len(by_index))])
        if step is self.steps[0]:
            found |= self.factors
        return {name: tensor.contiguous() for name, tensor in found.items()}

    def _content(self, pieces: Mapping[str, TensorInfo]) -> Iterator[bytes | memoryview]:
        """Make the file's bytes.  pieces: its tensors, by name."""
        yield self.header
        for tensor in self.tensors.values():
            yield from padded(chunks_of(pieces[tensor.name]), tensor)

    def _change(self, name: str) -> Any:
        return self.known.change_of(name, self.prepared.config.head_dim)

    def _plan(self) -> dict[str, FileTensor]:
        """Plan the file's tensors from the model's.  ConfigError for what files of the architecture do not have."""
        planned: dict[str, FileTensor] = {}
        experts: Counter[str] = Counter()
        for name, kind, shape in self._stored_tensors():
            own, expert = self._file_name(name)
            if kind in FLOAT_KINDS and _in_float32(own, shape):
                kind = "F32"
            if len(shape) == 2 and shape[0] == 1 and own.endswith("ffn_gate_inp_shexp.weight"):
                shape = shape[1:]  # as llama.cpp stores a single row
            if expert is None:
                planned[own] = FileTensor(own, kind, shape)
                continue
            experts[own] += 1
            before = planned.setdefault(own, FileTensor(own, kind, (0, *shape)))
            if (before.type, before.shape[1:]) != (kind, shape):
                raise ConfigError(
                    "the experts of a layer are one tensor of a GGUF file, and have one type",
                    code="spelling",
                    tensor=name,
                    expected=f"{before.type} {list(before.shape[1:])}, as the others",
                    found=f"{kind} {list(shape)}",
                    fix="Give all experts of a layer the same rule.",
                )
        for own, count in experts.items():
            planned[own] = replace(planned[own], shape=(count, *planned[own].shape[1:]))
        for own, factors in self.factors.items():
            planned[own] = FileTensor(own, "F32", tuple(factors.shape))
        return planned

    def _stored_tensors(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """Yield the model's tensors as they will be written: name, type, and shape in values."""
        for step in self.steps:
            for info in step.copied:
                yield info.name, _type_of(info), info.shape
            for layer in step.layers:
                weight = self.planned(layer)
                method = self.storage(layer, weight)
                if isinstance(method, GGUFLinearMethod):
                    yield f"{layer.name}.weight", method.kind, weight.shape
                elif self.keeps(layer, weight):
                    yield f"{layer.name}.weight", _type_of(layer.placements[0].tensor), weight.shape
                else:
                    assert isinstance(weight, DenseWeight)
                    yield f"{layer.name}.weight", DTYPE_NAMES[weight.weight.dtype], weight.shape
                for place in layer.placements if self.keeps(layer, weight) else ():
                    if place.slot.spec.name != "weight":
                        yield (
                            f"{layer.name}.{place.slot.spec.name}",
                            _type_of(place.tensor),
                            place.tensor.shape,
                        )

    def _file_name(self, name: str) -> tuple[str, int | None]:
        found = self.known.file_name(name)
        if found is None:
            raise ConfigError(
                f"GGUF files of {self.architecture} have no tensor for this one",
                code="spelling",
                tensor=name,
                fix="Write another format: --format compressed-tensors.",
            )
        return found


def _type_of(info: TensorInfo) -> str:
    """Name the type of a tensor that is copied.  ConfigError for a dtype that files of models do not have."""
    if info.torch_dtype not in DTYPE_NAMES:
        raise ConfigError(
            "a GGUF model has no tensors of this dtype",
            code="spelling",
            tensor=info.name,
            expected=" or ".join(FLOAT_KINDS),
            found=info.dtype_name,
        )
    return DTYPE_NAMES[info.torch_dtype]


def _in_float32(name: str, shape: tuple[int, ...]) -> bool:
    """Tell whether llama.cpp wants a tensor of floats in float32: norms, biases, routers."""
    return len(shape) == 1 or name.endswith(".bias") or ".ffn_gate_inp" in name
