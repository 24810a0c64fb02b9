"""The loading of an adapter's folder onto a model's layers: every tensor finds its layer, or nothing is loaded."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pymllm.adapters.config import WEIGHTS_FILE, LoRAConfig, load_lora_config
from pymllm.disk import names_files
from pymllm.errors import CheckpointError, ConfigError, choices, counted, nearest
from pymllm.kernels.canonical import DenseWeight
from pymllm.layers.lora import DEFAULT_ADAPTER, LayerAdapter, LoRAPart
from pymllm.layers.weighted import WeightedLayer, weighted_layers
from pymllm.patterns import bounded_steps
from pymllm.quantization.binding import bound_weight
from pymllm.weights.loader import Slot, slots_of, write, written_of
from pymllm.weights.loader import place as place_tensor
from pymllm.weights.report import HINTS, Problem, mismatch, raise_problems
from pymllm.weights.safetensors_file import SafetensorsFile, TensorInfo
from pymllm.weights.spec import FLOATS, IN, OUT, LinearShape, WeightSpec

logger = logging.getLogger("pymllm")

PREFIX = "base_model.model."  # before every name in a PEFT file
MAX_PRODUCT = 1e9  # of weights: beyond, 10,000 inputs of 10,000 each give what has no square in float32


@dataclass
class LoadedAdapter:
    """An adapter that a model holds.

    layers: the checkpoint names of the weights that it adapts.  nbytes: the bytes of its matrices on this rank.
    unmerged: after `merge_lora_weights`, the reason why a layer keeps it beside its weights, by the layer's name.
    """

    name: str
    config: LoRAConfig
    layers: tuple[str, ...]
    nbytes: int
    merged: bool = False
    unmerged: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        size = f"{counted(len(self.layers), 'weight')}, {self.nbytes / 1e6:.1f} MB"
        return f"adapter {self.name!r}: rank {self.config.rank} on {size}"


@dataclass(frozen=True)
class _Place:
    """One weight that an adapter may be on.  part: the index of the weight among its layer's parts."""

    name: str
    layer: WeightedLayer
    part: int

    @property
    def shape(self) -> LinearShape:
        return replace(self.layer.shape.part(self.part), parts=(self.name,))

    def make(self, config: LoRAConfig, device: torch.device | None = None) -> LoRAPart:
        """Make the matrices of the adapter on this weight, all zeros.  device: None: the weight's."""
        before = sum(span.size for span in self.layer.shape.outputs[: self.part])
        shape = self.shape
        rows = slice(before, before + shape.out_features_local)
        return LoRAPart(
            self.layer.kind,
            shape,
            rows,
            config.rank_of(self.name),
            config.scaling_of(self.name),
            device or self.layer.weight_device,
        )


def loaded_adapters(model: nn.Module) -> dict[str, LoadedAdapter]:
    """Return the adapters that a model holds, by name."""
    return model.__dict__.setdefault("lora_adapters", {})


def enable_lora_for_model(model: nn.Module, config: LoRAConfig, *, name: str = DEFAULT_ADAPTER) -> list[str]:
    """Give every layer that `config` targets an adapter that changes nothing yet, and make it the active one.

    Returns the checkpoint names of the targeted weights.  CheckpointError for a target that names none.
    """
    _check_name(name)
    _check_unmerged(model, name)
    problems: list[Problem] = []
    with bounded_steps():
        places = _targeted(model, config, problems)
        raise_problems(str(config.path), problems)
        staged = _stage(places, config)
    for place, part in staged:
        if place.layer.kind != "embedding":
            part.start(place.layer.shape, f"{name} {place.name}")
    _attach(model, name, config, staged)
    _activate(model, name)
    return [place.name for place in places]


@names_files
def load_lora_weights(
    model: nn.Module,
    path: str | Path,
    pre_merge_lora: bool = False,
    *,
    name: str = DEFAULT_ADAPTER,
    activate: bool = True,
) -> LoadedAdapter:
    """Load a PEFT adapter onto a model, under a name, in place of an adapter that has the name already.

    path: its folder (adapter_config.json, adapter_model.safetensors), or a hub id.
    activate: whether it applies to requests that name no adapter; else it applies only to those that name it.
    pre_merge_lora: merge it into weights that are plain floats, without keeping those for `unmerge_lora_weights`.

    Raises ConfigError for unsupported settings, and ONE CheckpointError that lists every target that names no layer,
    every tensor that no layer takes, and every tensor that is missing or misshapen.  The model is then as it was.
    """
    config = load_lora_config(path)
    _check_name(name)
    _check_unmerged(model, name)
    with bounded_steps(), SafetensorsFile.open(_weights_file(config.path)) as file:
        problems: list[Problem] = []
        places = _targeted(model, config, problems)
        # Without memory, until the file is known to have matrices of these shapes: a rank is any number.
        drafts = _stage(places, config, torch.device("meta"))
        matched, copies = _match(model, drafts, file.tensors, problems)
        raise_problems(str(file.path), problems)
        for place, slot, tensor in copies:
            _check_copy(place, slot, tensor)
        staged = _stage(places, config)
        made = {draft: part for (_, draft), (_, part) in zip(drafts, staged, strict=True)}
        for draft, attribute, slot, tensor in matched:
            _read(made[draft], attribute, slot, tensor)
        for place, part in staged:
            _check_product(place, part, file.path)
    adapter = _attach(model, name, config, staged)
    if activate:
        _activate(model, name)
    logger.info(str(adapter))
    if pre_merge_lora:
        merge_lora_weights(model, name, keep_base=False)
    return adapter


def unload_lora_weights(model: nn.Module, name: str = DEFAULT_ADAPTER) -> None:
    """Remove an adapter from the model.  ConfigError if there is none of that name, or if it is merged."""
    _adapter(model, name)
    _check_unmerged(model, name)
    for layer in weighted_layers(model):
        layer.detach_adapter(name)
    del loaded_adapters(model)[name]


def merge_lora_weights(
    model: nn.Module, name: str = DEFAULT_ADAPTER, *, keep_base: bool = True
) -> LoadedAdapter:
    """Merge an adapter into every weight that is plain floats; beside other weights it stays as it is, and active.

    Every request then has it.  keep_base: keep the weights as they are now, so that `unmerge_lora_weights` can put them
    back bit for bit.  `unmerged` of the result names the layers that keep it beside their weights, and says why.
    """
    adapter = _adapter(model, name)
    other = merged_adapter(model)
    if other not in (None, name):
        raise ConfigError(
            f"{name!r} cannot be merged: the adapter {other!r} is merged already",
            code="lora-merged",
            fix="Unmerge it first.",
        )
    if adapter.merged:
        return adapter
    active = {layer: layer.active_adapter for layer in weighted_layers(model)}
    try:
        for layer in active:
            if name in layer.adapters:
                reason = layer.merge_lora(name, keep_base=keep_base)
                if reason is not None:
                    adapter.unmerged[layer.prefix] = reason
    except BaseException:
        if not keep_base:
            # Some weights are gone: beside the others the adapter goes on as it is.
            _activate(model, name)
            adapter.merged = True
            raise
        for layer, before in active.items():
            if name in layer.adapters:
                layer.unmerge_lora()
            layer.active_adapter = before
        adapter.unmerged = {}
        raise
    _activate(model, name)
    adapter.merged = True
    return adapter


def unmerge_lora_weights(model: nn.Module) -> None:
    """Put the weights back that were there before `merge_lora_weights`.  Do nothing if no adapter is merged.

    Afterwards no adapter is active, so that requests which name none get the base model.
    """
    name = merged_adapter(model)
    if name is None:
        return
    for layer in weighted_layers(model):
        layer.unmerge_lora()
    adapter = _adapter(model, name)
    adapter.merged, adapter.unmerged = False, {}
    _activate(model, None)


def why_adapter_is_gone(model: nn.Module, adapter: LoadedAdapter) -> str | None:
    """Return why what began with an adapter cannot go on with it, or None if it can."""
    now = loaded_adapters(model).get(adapter.name)
    if now is None:
        return "was unloaded"
    if now is not adapter:
        return "was replaced by another of its name"
    merged = merged_adapter(model)
    return None if merged in (None, adapter.name) else f"is hidden by {merged!r}, which was merged"


def merged_adapter(model: nn.Module) -> str | None:
    """Return the name of the adapter that is merged into the model's weights, or None."""
    return next((name for name, adapter in loaded_adapters(model).items() if adapter.merged), None)


def _adapter(model: nn.Module, name: str) -> LoadedAdapter:
    known = loaded_adapters(model)
    if name not in known:
        raise ConfigError(
            f"the model holds no adapter {name!r}",
            code="lora-unknown",
            expected=choices(known, name) or "an adapter that was loaded",
            found=name,
            fix=nearest(name, known),
        )
    return known[name]


def _check_unmerged(model: nn.Module, name: str) -> None:
    if merged_adapter(model) == name:
        raise ConfigError(
            f"the adapter {name!r} is merged into the weights", code="lora-merged", fix="Unmerge it first."
        )


def _activate(model: nn.Module, name: str | None) -> None:
    for layer in weighted_layers(model):
        layer.active_adapter = name


def _weights_file(folder: Path) -> Path:
    file = folder / WEIGHTS_FILE
    if not file.exists() and (folder / "adapter_model.bin").exists():
        raise CheckpointError(
            "the adapter is pickled, which is never opened",
            code="pickle-only",
            file=str(folder / "adapter_model.bin"),
            expected=WEIGHTS_FILE,
            fix="Load it with PEFT and save it again: save_pretrained(folder, safe_serialization=True).",
        )
    return file


def _places(model: nn.Module) -> Iterator[_Place]:
    """Yield every weight that an adapter may be on, by its checkpoint name."""
    for layer in weighted_layers(model):
        for index, name in enumerate(layer.names()):
            yield _Place(name, layer, index)


def _targeted(model: nn.Module, config: LoRAConfig, problems: list[Problem]) -> list[_Place]:
    """Find the weights that an adapter targets.  A target that names none is a problem."""
    places = list(_places(model))
    kinds = {place.name: place.layer.kind for place in places}
    for target in config.unmatched(kinds):
        endings = {name.rpartition(".")[2] for name in kinds}
        hint = nearest(target, endings) or nearest(target, kinds)
        text = f"a target of the adapter that names no layer of this model. {hint}".strip()
        problems.append(Problem("adapter-target", target, text))
    return [place for place in places if config.targets(place.name, kinds[place.name])]


def _stage(
    places: list[_Place], config: LoRAConfig, device: torch.device | None = None
) -> list[tuple[_Place, LoRAPart]]:
    return [(place, place.make(config, device)) for place in places]


# A targeted embedding's or head's own weight, which PEFT saves beside the matrices.
COPY = "base_layer.weight"
Matched = tuple[LoRAPart, str, Slot, TensorInfo]
Copy = tuple[_Place, Slot, TensorInfo]


def _match(
    model: nn.Module,
    staged: list[tuple[_Place, LoRAPart]],
    tensors: Mapping[str, TensorInfo],
    problems: list[Problem],
) -> tuple[list[Matched], list[Copy]]:
    """Find the tensor of each matrix, and the copies of base weights.

    A matrix without a tensor is a problem, and so is a tensor that is left over.
    """
    named = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    slots = [
        (part, attribute, slot)
        for _, part in staged
        for attribute in "AB"
        for slot in slots_of(getattr(part, attribute)) or ()
    ]
    wanted = {slot.tensor for _, _, slot in slots}
    stray = [name for name in named if name not in wanted]
    matched = []
    for part, attribute, slot in slots:
        tensor = named.get(slot.tensor)
        if tensor is None and slot.together and slot.part:
            continue  # it is reported for the first part
        if tensor is None:
            hint = nearest(slot.tensor, stray) if len(problems) < HINTS else ""
            text = (
                f"missing: the adapter targets its layer, which needs it as {list(slot.source_shape)}. {hint}"
            )
            problems.append(Problem("missing", slot.tensor, text.strip()))
            continue
        problem = mismatch(slot, tensor)
        if problem is not None and problem not in problems:  # the tensor may hold several parts
            problems.append(problem)
        matched.append((part, attribute, slot, tensor))
    copies = []
    for place, _ in staged:
        tensor = named.get(f"{place.name}.{COPY}")
        if tensor is not None and place.layer.kind in ("embedding", "lm_head"):
            stray.remove(f"{place.name}.{COPY}")
            (slot,) = place_tensor(
                WeightSpec(COPY, place.shape.dtype, (OUT, IN), accepts=FLOATS), place.shape
            )[1]
            problem = mismatch(slot, tensor)
            problems += [] if problem is None else [problem]
            copies.append((place, slot, tensor))
    layers = {place.name for place in _places(model)}
    for name in stray:
        problems.append(_unexpected(name, named[name].name, layers, wanted, len(problems) < HINTS))
    return matched, copies


def _check_copy(place: _Place, slot: Slot, tensor: TensorInfo) -> None:
    """Check that a copy of base weights equals the model's.  CheckpointError if not, or if those are quantised."""
    bound = bound_weight(place.layer)
    weight = None if bound is None else bound.canonical()
    if isinstance(weight, DenseWeight):
        mine = weight.weight[slot.target]
        if torch.equal(tensor.read(slot.source).to(mine.device, mine.dtype), mine):
            return
        found = "other weights, perhaps of a larger vocabulary or trained ones"
    else:
        found = "weights that cannot be compared, as the model's are quantised"
    raise CheckpointError(
        "the adapter brings base weights of its own",
        code="adapter-base-weights",
        file=str(tensor.file.path),
        tensor=tensor.name,
        expected="a copy of the model's, or none",
        found=found,
        fix="If they are the model's, save the adapter with save_embedding_layers=False.",
    )


def _unexpected(name: str, full: str, layers: set[str], wanted: set[str], hinted: bool) -> Problem:
    layer, _, suffix = name.partition(".lora_")
    if not suffix:
        text = "unexpected: it is no LoRA matrix, and whole weights beside an adapter are not supported."
    elif layer in layers:
        text = "unexpected: the adapter's target_modules leave its layer out."
    else:
        hint = (nearest(layer, layers) or nearest(name, wanted)) if hinted else ""
        text = f"unexpected: no layer that takes adapters is called {layer}. {hint}".strip()
    return Problem("unexpected", full, text)


def _read(part: LoRAPart, attribute: str, slot: Slot, tensor: TensorInfo) -> None:
    """Read this rank's slice of one matrix.  CheckpointError for numbers that are not finite."""
    param: Any = getattr(part, attribute)
    write(param.data, slot, tensor.read(slot.source).to(param.device), written_of(param))
    bad = int((~torch.isfinite(param.data)).sum())
    if bad:
        raise CheckpointError(
            "the adapter holds numbers that are not finite",
            code="bad-content",
            file=str(tensor.file.path),
            tensor=tensor.name,
            expected="finite values",
            found=f"{bad} that are NaN or infinite",
        )


def _check_product(place: _Place, part: LoRAPart, file: Path) -> None:
    """Refuse matrices whose product is so large that the model's numbers would leave float32."""
    largest = abs(part.scaling) * part.rank
    for matrix in (part.A, part.B):
        largest *= float(matrix.detach().abs().max()) if matrix.numel() else 0.0
    if not largest < MAX_PRODUCT:
        raise CheckpointError(
            "the adapter's numbers are out of range",
            code="bad-content",
            file=str(file),
            tensor=place.name,
            expected=f"scaling · B @ A within {MAX_PRODUCT:.0e}; weights are near 1",
            found=f"up to {largest:.3g}, with a scaling of {part.scaling:.3g}",
        )


def _check_name(name: str) -> None:
    if not isinstance(name, str) or not name or not name.isprintable():
        raise ConfigError(
            f"an adapter cannot be called {name!r}", code="lora-name", expected="a printable name"
        )


def _attach(
    model: nn.Module, name: str, config: LoRAConfig, staged: list[tuple[_Place, LoRAPart]]
) -> LoadedAdapter:
    """Put the matrices on their layers, under the adapter's name, in place of the adapter that had the name."""
    by_layer: dict[WeightedLayer, list[LoRAPart]] = {}
    for place, part in staged:
        by_layer.setdefault(place.layer, []).append(part)
    adapters = {layer: LayerAdapter(parts) for layer, parts in by_layer.items()}
    for adapter in adapters.values():
        adapter.stack()  # what takes memory comes first: no layer has the adapter if that fails
    for layer in weighted_layers(model):
        if layer in adapters:
            layer.attach_adapter(name, adapters[layer])
        elif name in layer.adapters:
            layer.detach_adapter(name)
    nbytes = sum(matrix.nbytes for _, part in staged for matrix in (part.A, part.B))
    loaded = LoadedAdapter(name, config, tuple(place.name for place, _ in staged), nbytes)
    loaded_adapters(model)[name] = loaded
    return loaded
