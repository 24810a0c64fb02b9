"""The writer of golden vectors that every `quantization/*/make_golden.py` shares.

A golden vector is a safetensors file about one linear layer, `golden/NAME.safetensors` beside the script. NAME says the
layer's sizes, as in `w4-o64-i128-sym`. The file holds the tensors that a format's own writer stores, `dequantized`
[O, I] float32, which is what that writer says they mean, and mostly `weight_float` [O, I], from which they were made.
Its metadata holds one entry, `case`, a JSON object of these facts:

    format                     the name of the format
    quantization_config        what config.json would say
    in_features, out_features  the sizes of the layer
    group_size                 the inputs of a scale, -1 for a whole row, or null
    block_size                 the [outputs, inputs] of a scale, or null
    orientation                the axes of the float tensors
    dequantized_by             the function that computed `dequantized`
    dequantized_rounded_to     the dtype in which it did; the file widens it to float32
    made_by                    the writer of the format and its version
    note                       what a script changed in the writer's input or output, or null
    seed                       the seed of the random weight

The scripts run as modules, from the repository's root: `python -m quantization.awq.make_golden`.

Legend: I in_features, O out_features.
"""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

ORDER = (
    "format",
    "quantization_config",
    "in_features",
    "out_features",
    "group_size",
    "block_size",
    "orientation",
    "dequantized_by",
    "dequantized_rounded_to",
    "made_by",
    "note",
    "seed",
)


def sizes(name: str) -> tuple[int, int]:
    """Return (out_features, in_features) as a vector's name says them: "o64" and "i128" between dashes."""
    found = [re.search(rf"\b{letter}(\d+)\b", name) for letter in "oi"]
    out_features, in_features = (int(size[1]) for size in found if size)
    return out_features, in_features


def random_weight(name: str, seed: int) -> Tensor:
    """Make a weight of the vector's sizes: [O, I] float32, normal with a deviation of 0.05, as a layer's might be."""
    return torch.randn(sizes(name), generator=torch.Generator().manual_seed(seed)) * 0.05


def write_vector(
    script: str,
    name: str,
    stored: dict[str, Tensor],
    dequantized: Tensor,
    weight_float: Tensor | None = None,
    *,
    last: tuple[str, ...] = (),
    **facts,
) -> None:
    """Write one golden vector, and print its path.

    script: `__file__` of the caller.  stored: the tensors by the names that the format gives them.
    dequantized: [O, I] in the dtype that its maker computed.  weight_float: [O, I], None where there was no weight.
    last: the facts that the case ends with, in this order, instead of their places in ORDER.
    facts: those of the case that the tensors do not say; group_size and block_size are null unless given.
    """
    assert tuple(dequantized.shape) == sizes(name)
    floats = {} if weight_float is None else {"weight_float": weight_float}
    axes = "weight_float and dequantized are" if floats else "dequantized is"
    facts = {
        "out_features": dequantized.shape[0],
        "in_features": dequantized.shape[1],
        "group_size": None,
        "block_size": None,
        "orientation": f"{axes} [out_features, in_features]",
        "dequantized_rounded_to": str(dequantized.dtype).removeprefix("torch."),
    } | facts
    places = [key for key in ORDER if key not in last] + list(last)
    assert facts.keys() <= set(places)
    case = {key: facts[key] for key in places if key in facts}
    path = Path(script).parent / "golden" / f"{name}.safetensors"
    save(path, stored | floats | {"dequantized": dequantized.float()}, case=json.dumps(case))


def save(path: Path, tensors: dict[str, Tensor], **metadata: str) -> None:
    """Write a safetensors file, and print its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    print(path)
