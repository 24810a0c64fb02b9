"""Tensors that contradict: relabelled, renamed, dropped, doubled, turned, cut, with impossible values, or too many.

A case is a recipe, which is applied to the tensors of a good checkpoint.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from .headers import joined, split
from .inputs import Input, Meaning
from .subjects import Checkpoints, logits, logits_of_llm, subjects

FILE = "model.safetensors"
RECIPE = "recipe.json"
# By safetensors' name, the bytes of an element and how Python's struct has it; None: no plain number.
TYPES: dict[str, tuple[int, str | None]] = {
    **{
        "F64": (8, "d"),
        "F32": (4, "f"),
        "F16": (2, "e"),
        "BF16": (2, None),
        "I64": (8, "q"),
        "I32": (4, "i"),
    },
    **{"I16": (2, "h"), "I8": (1, "b"), "U64": (8, "Q"), "U32": (4, "I"), "U16": (2, "H"), "U8": (1, "B")},
    **{"BOOL": (1, None), "F8_E4M3": (1, None), "F8_E5M2": (1, None), "F8_E8M0": (1, None)},
}
FLOATS = ("F64", "F32", "F16", "BF16")
# The bits of values that a scale, a norm or a bias cannot have.
BITS = {
    "F32": {"nan": 0x7FC00000, "inf": 0x7F800000, "negative": 0xBF000000, "zero": 0},
    "F16": {"nan": 0x7E00, "inf": 0x7C00, "negative": 0xB800, "zero": 0},
    "BF16": {"nan": 0x7FC0, "inf": 0x7F80, "negative": 0xBF00, "zero": 0},
    "F8_E4M3": {"nan": 0x7F, "negative": 0xB0, "zero": 0},
    "F8_E8M0": {"nan": 0xFF},
}
SCALES = (
    "scale",
    "scales",
    "weight_scale",
    "weight_scale_inv",
    "weight_scale_2",
    "SCB",
    "absmax",
    "input_scale",
)
SCALES = (*SCALES, "nested_absmax", "_weight_scale")
# Of blocks that are zeros, or of formats whose scales have a sign.
SIGNED = ("auto-round-gptq", "mlx-4", "mlx-8")
ZERO = ("SCB", "absmax", "nested_absmax")
STRANGE = (
    *(
        "qzeros",
        "g_idx",
        "weight_zero_point",
        "weight_g_idx",
        "bias",
        "biases",
        "weight_scale",
        "weight_scale_inv",
    ),
    *("input_scale", "weight_scale_2", "weight_global_scale", "input_global_scale", "weight_shape", "SCB"),
    *(
        "weight.absmax",
        "weight.quant_map",
        "zero",
        "meta",
        "k_scale",
        "v_scale",
        "pre_quant_scale",
        "weight_packed",
    ),
    *(
        "qweight",
        "weight_blocks",
        "weight_scales",
        "lora_A.weight",
        "output_scale",
        "smooth_factor",
        "weight",
    ),
)


class Stored:
    """The tensors of a safetensors file as bytes, in order: name, type, shape, data."""

    def __init__(self, data: bytes) -> None:
        header, rest = split(data)
        self.metadata = header.pop("__metadata__", None)
        self.tensors: dict[str, tuple[str, list[int], bytes]] = {
            name: (entry["dtype"], entry["shape"], rest[slice(*entry["data_offsets"])])
            for name, entry in header.items()
        }

    def written(self) -> bytes:
        """Return the file."""
        header: dict[str, Any] = {} if self.metadata is None else {"__metadata__": self.metadata}
        start, pieces = 0, []
        for name, (kind, shape, data) in self.tensors.items():
            header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, start + len(data)]}
            start += len(data)
            pieces.append(data)
        return joined(json.dumps(header).encode(), b"".join(pieces))

    def apply(self, step: dict[str, Any]) -> None:
        """Do one step of a recipe."""
        way, name = step["way"], step["name"]
        if name not in self.tensors and way != "add":
            return
        kind, shape, data = self.tensors.get(name, ("F32", [], b""))
        if way == "drop":
            del self.tensors[name]
        elif way in ("rename", "double"):
            self.tensors[step["to"]] = kind, shape, data
            if way == "rename":
                del self.tensors[name]
        elif way == "relabel":
            self.tensors[name] = _relabelled(kind, shape, data, step["to"])
        elif way == "cast":
            self.tensors[name] = _cast(kind, shape, data, step["to"])
        elif way == "shape":
            self.tensors[name] = kind, step["to"], data
        elif way == "turn":
            size = TYPES[kind][0]
            rows, columns = shape
            turned = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(rows, columns, size)
            self.tensors[name] = kind, [columns, rows], turned.transpose(0, 1).contiguous().numpy().tobytes()
        elif way == "cut":
            row = len(data) // shape[0]
            self.tensors[name] = kind, [shape[0] - 1, *shape[1:]], data[:-row]
        elif way == "pad":
            row = len(data) // shape[0]
            self.tensors[name] = kind, [shape[0] + 1, *shape[1:]], data + data[-row:]
        elif way == "swap":
            other = self.tensors[step["to"]]
            if other[:2] == (kind, shape):
                self.tensors[name], self.tensors[step["to"]] = other, (kind, shape, data)
        elif way == "value":
            size = TYPES[kind][0]
            value = (step["bits"] % 256**size).to_bytes(size, "little")
            at = step["at"] % (len(data) // size) * size
            every = step.get("all", False)
            new = value * (len(data) // size) if every else data[:at] + value + data[at + size :]
            self.tensors[name] = kind, shape, new
        elif way == "add":
            count = 1
            for size in step["shape"]:
                count *= size
            kind = step["dtype"]
            value = step["bits"].to_bytes(TYPES[kind][0], "little")
            self.tensors.setdefault(name, (kind, step["shape"], value * count))


def _relabelled(kind: str, shape: list[int], data: bytes, to: str) -> tuple[str, list[int], bytes]:
    """Call the same bytes another type; the last size follows."""
    old, new = TYPES[kind][0], TYPES[to][0]
    if old == new:
        return to, shape, data
    last = shape[-1] * old if shape else 0
    return (kind, shape, data) if not last or last % new else (to, [*shape[:-1], last // new], data)


def _cast(kind: str, shape: list[int], data: bytes, to: str) -> tuple[str, list[int], bytes]:
    """Store the same values in another type, rounded where it has fewer bits."""
    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    dtypes |= {
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
    }
    if kind not in dtypes or not data:
        return kind, shape, data
    values = torch.frombuffer(bytearray(data), dtype=dtypes[kind]).to(dtypes[to])
    return to, shape, values.view(torch.uint8).numpy().tobytes()


def is_scale(name: str) -> bool:
    return name.endswith(tuple(f".{suffix}" for suffix in SCALES)) or name.endswith("_weight_scale")


def is_plain_weight(name: str, kind: str) -> bool:
    return kind in FLOATS and not is_scale(name) and name.endswith("weight") and "norm" not in name


class Tensors:
    """A good checkpoint whose config stays, and whose tensors say something else."""

    name = "tensors"

    def prepare(self, folder: Path) -> None:
        self.checkpoints = Checkpoints(folder, subjects())
        self.heads: dict[str, dict[str, tuple[str, list[int]]]] = {}

    def _head(self, subject: str) -> dict[str, tuple[str, list[int]]]:
        if subject not in self.heads:
            header, _ = split((self.checkpoints.folder(subject) / FILE).read_bytes())
            header.pop("__metadata__", None)
            self.heads[subject] = {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()}
        return self.heads[subject]

    def inputs(self) -> SearchStrategy[Input]:
        return Tensors._recipe(self)

    @st.composite
    @staticmethod
    def _recipe(draw: Any, self: Tensors) -> Input:
        subject = draw(st.sampled_from(list(self.checkpoints.writers)))
        steps, meanings = [], []
        for _ in range(draw(st.sampled_from((1,) * 9 + (2,)))):
            step, meaning = draw(Tensors._step(self, subject))
            steps.append(step)
            meanings.append(meaning)
        # What two steps say together may be right: one tensor for another.
        both: Meaning = meanings[0] if len(set(meanings)) == 1 and len(steps) == 1 else "means"
        told = "; ".join(" ".join(f"{value}" for value in step.values()) for step in steps)
        return Input(subject, {RECIPE: json.dumps(steps).encode()}, told, both)

    @st.composite
    @staticmethod
    def _step(draw: Any, self: Tensors, subject: str) -> tuple[dict[str, Any], Meaning]:
        head = self._head(subject)
        name = draw(st.sampled_from(list(head)))
        kind, shape = head[name]
        ways = [
            "drop",
            "rename",
            "double",
            "relabel",
            "relabel",
            "shape",
            "swap",
            "add",
            "add",
            "value",
            "value",
        ]
        ways += ["cut", "pad"] if shape and shape[0] > 1 else []
        ways += ["turn"] if len(shape) == 2 else []
        ways += ["cast"] if kind in (*FLOATS, "I32", "I8", "U8") else []
        way = draw(st.sampled_from(ways))
        step: dict[str, Any] = {"way": way, "name": name}
        meaning: Meaning = "breaks"
        if way in ("rename", "double"):
            step["to"] = draw(st.sampled_from(self._other_names(name, head)))
        elif way == "relabel":
            step["to"] = draw(st.sampled_from([each for each in TYPES if each != kind]))
            # Sixteen bits of a float are as right a float of the other kind.
            if {kind, step["to"]} == {"F16", "BF16"}:
                meaning = "means"
        elif way == "cast":
            options = FLOATS if kind in FLOATS else ("I64", "I32", "I16", "F32")
            step["to"] = draw(st.sampled_from(options))
            meaning = "means"
        elif way == "shape":
            count = 1
            for size in shape:
                count *= size
            options = [[count], [1, *shape], [*shape, 1], [count // 2, 2], [2, count // 2], [1] * len(shape)]
            if len(shape) == 2:
                options.append(shape[::-1])
            options = [each for each in options if _product(each) == count and each != shape]
            step["to"] = draw(st.sampled_from(options or [shape]))
        elif way == "swap":
            alike = [other for other in head if head[other] == head[name]]
            step["to"] = draw(st.sampled_from(alike))
            meaning = "means"
        elif way == "turn" and shape[0] == shape[1]:
            meaning = "means"
        elif way == "value":
            what = draw(st.sampled_from(sorted(BITS.get(kind, {"some": 0}))))
            bits = BITS.get(kind, {}).get(what)
            if bits is None:
                bits = draw(st.integers(0, 256 ** TYPES[kind][0] - 1))
            step |= {"what": what, "bits": bits, "at": draw(st.integers(0, 63)), "all": draw(st.booleans())}
            meaning = self._meaning_of_value(subject, name, kind, what)
        elif way == "add":
            layer = name.rpartition(".")[0]
            step["name"] = f"{layer}.{draw(st.sampled_from(STRANGE))}"
            step["dtype"] = draw(st.sampled_from(("F32", "F16", "I32", "I8", "U8", "F8_E4M3")))
            outputs = shape[0] if shape else 1
            step["shape"] = draw(st.sampled_from(([], [1], [outputs], [outputs, 1], shape, [0])))
            step["bits"] = draw(st.sampled_from((0, 1, 0x38)))
        return step, meaning

    def _meaning_of_value(self, subject: str, name: str, kind: str, what: str) -> Meaning:
        """Return what another value at one place says."""
        if kind not in BITS:
            return "means"
        if what in ("nan", "inf"):
            # NaN in an e4m3 code or a weight is what it is: the weights are not searched.
            return "breaks" if is_scale(name) or "norm" in name or name.endswith("bias") else "means"
        if not is_scale(name):
            return "means"
        if what == "negative":
            return "means" if subject in SIGNED else "breaks"
        may_be_zero = name.endswith(ZERO) or kind == "F8_E4M3" or subject in SIGNED
        return "means" if may_be_zero else "breaks"

    @staticmethod
    def _other_names(name: str, head: Any) -> list[str]:
        layer, _, suffix = name.rpartition(".")
        made = [
            f"{name}x",
            f"x{name}",
            f"{layer}.{suffix.upper()}",
            f"model.{name}",
            f"{name} ",
            f"{layer}.x.{suffix}",
        ]
        made += [
            name.replace("layers.0", "layers.1"),
            name.replace("layers.0", "layers.00"),
            name.replace("_proj", ""),
        ]
        made += [f"{layer}.{other}" for other in STRANGE]
        made += [name.replace("lm_head", "head"), name.replace("model.", "", 1), name.removesuffix(".weight")]
        return [other for other in dict.fromkeys(made) if other and other not in head] or [f"{name}x"]

    def judge(self, given: Input, folder: Path) -> bool:
        stored = Stored((self.checkpoints.folder(given.subject) / FILE).read_bytes())
        for step in json.loads(given.files[RECIPE]):
            stored.apply(step)
        data = stored.written()
        path = self.checkpoints.copy(given.subject, folder, {FILE: data})
        whole = struct.unpack("<Q", data[:8])[0] % 8 == 0
        found = (logits_of_llm if whole else logits)(path)
        return torch.equal(found, self.checkpoints.answer(given.subject, logits))


def _product(shape: list[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
