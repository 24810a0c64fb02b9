"""Which of transformers' classes runs a config.json, and the class's model on the meta device."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import nn

from pymllm.config import ModelConfig
from pymllm.errors import ConfigError, nearest

P = ParamSpec("P")
R = TypeVar("R")

# What a config calls the most positions that a text has, where it does not use the usual name.
LENGTHS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "max_sequence_length",
    "seq_length",
)
UNLIMITED = 1 << 20  # the positions of a model whose config has no limit

SIZES = {"intermediate_size", "moe_intermediate_size", "num_experts", "n_routed_experts", "num_local_experts"}

# A model is built under patches of torch's functions and its default dtype, which all threads see.
BUILDING = threading.RLock()

# Settings that are no part of the maths, or belong to us.
OURS = ("quantization_config", "compression_config", "auto_map")


class GenericConfig(ModelConfig):
    """A config.json as transformers reads it, for a model that runs its class.

    architecture: the name of the class.  hf: transformers' config of it.  made: the class; None: transformers' of that
    name.
    """

    def __init__(self, raw: Mapping[str, Any], architecture: str, hf: Any, made: Any = None) -> None:
        text = hf.get_text_config(decoder=True)
        names = {name: _setting(text, name) for name in ("num_key_value_heads", "head_dim", "vocab_size")}
        names |= {name: _setting(text, name) for name in ("hidden_size", "num_hidden_layers")}
        names["num_attention_heads"] = _integer(_setting(text, "num_attention_heads")) or 1
        names["tie_word_embeddings"] = bool(getattr(hf, "tie_word_embeddings", False))
        lengths = (_integer(_setting(text, name)) for name in LENGTHS)
        names["max_position_embeddings"] = next((length for length in lengths if length), UNLIMITED)
        given = {name: value for name, value in raw.items() if name not in names or _integer(value)}
        for name in SIZES & given.keys():  # one for each layer, perhaps
            names[name] = given[name]
        for name, value in names.items():
            number = _integer(value) if name != "tie_word_embeddings" else value
            if number is not None:
                given[name] = number
            elif name in SIZES:
                given.pop(name, None)
        super().__init__(given, {"hidden_size": 1, "num_hidden_layers": 1})  # where each part has its own
        self.__dict__["architecture"], self.__dict__["hf"], self.__dict__["made"] = architecture, hf, made

    def untied(self) -> GenericConfig:
        hf = copy.deepcopy(self.hf)
        hf.tie_word_embeddings = False
        found = GenericConfig(self.raw, self.architecture, hf, self.made)
        found.wrapper = self.wrapper
        return found

    @functools.cached_property
    def skeleton(self) -> Any:
        """The class's model without data and without our layers, for the names of its modules."""
        return build_on_meta(self, torch.float32, "eager")

    @property
    def places(self) -> tuple[str, str]:
        """The names of the model without its head, and of the head."""
        names = {id(module): name for name, module in self.skeleton.named_modules()}
        return names[id(self.skeleton.get_decoder())], self.head_names[0]

    @property
    def head_names(self) -> tuple[str, str]:
        tied = self.skeleton.all_tied_weights_keys
        modules = {id(module): name for name, module in self.skeleton.named_modules()}
        head = modules.get(id(self.skeleton.get_output_embeddings()), "")
        source = tied.get(f"{head}.weight", "").rpartition(".")[0]
        return head, source or modules.get(id(self.skeleton.get_input_embeddings()), "")

    def refuse_ignored(self) -> None:
        """Refuse nothing: transformers' class reads what it computes with."""


def _setting(hf: Any, name: str) -> Any:
    """Return a setting; None where there is none, or each layer has its own."""
    try:
        return getattr(hf, name, None)
    except Exception:
        return None


def _integer(value: Any) -> int | None:
    """Return a positive integer, or the largest of a list of them (one for each layer); else None."""
    if isinstance(value, (list, tuple)) and value and all(isinstance(one, int) for one in value):
        value = max(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def read_generic_config(raw: Mapping[str, Any]) -> GenericConfig:
    """Read a config.json as transformers does.  ConfigError where transformers has no decoder for it."""
    name, config_class = find_class(raw)
    return GenericConfig(raw, name, read_hf_config(name, config_class, raw))


def read_hf_config(name: str, config_class: Any, raw: Mapping[str, Any]) -> Any:
    """Read a config.json as transformers' config of a class.  ConfigError where transformers does not take it.

    name: of the class.
    """
    _refuse_counts(raw)
    try:
        settings = {key: _read_float(value) for key, value in raw.items() if key not in OURS}
        settings.pop("model_type", None)
        return config_class.from_dict(settings)
    except Exception as error:
        raise ConfigError(
            f"transformers does not take this config.json for {name}",
            code="config-value",
            file="config.json",
            tensor="model_type",
            expected=f"settings of {config_class.__name__}",
            found=" ".join(str(error).split())[:300],
        ) from error


# Settings of which a config's class makes a list with so many items, and more of them than any model has.
COUNTED = re.compile(r"layer|label|block|depth|stage|expert")
MOST_COUNTED = 100_000


def _refuse_counts(settings: Mapping[str, Any]) -> None:
    """Raise ConfigError for a number of layers or the like, at any depth, for which no list should be made."""
    for name, value in settings.items():
        if isinstance(value, Mapping) and name not in OURS:
            _refuse_counts(value)
        elif type(value) is int and value > MOST_COUNTED and COUNTED.search(str(name)):
            raise ConfigError(
                f"the setting {name} has a value that it cannot have",
                code="config-value",
                file="config.json",
                tensor=str(name),
                expected=f"at most {MOST_COUNTED}",
                found=str(value),
            )


def _read_float(value: Any) -> Any:
    """Read what JSON has no number for, as transformers writes it: {"__float__": "Infinity"}."""
    if isinstance(value, Mapping):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _read_float(one) for key, one in value.items()}
    return [_read_float(one) for one in value] if isinstance(value, list) else value


@functools.cache
def decoders() -> dict[str, str]:
    """List transformers' decoders: the class's name by model type."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return {
        model_type: names if isinstance(names, str) else names[0]
        for model_type, names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
    }


def find_class(raw: Mapping[str, Any]) -> tuple[str, Any]:
    """Find the decoder that a config.json names: by `architectures`, then by `model_type`.

    Returns the class's name, and the class of its config.  ConfigError where there is none.
    """
    known, model_type = decoders(), raw.get("model_type")
    named, brought = raw.get("architectures"), raw.get("auto_map")
    # A checkpoint that brings code along may call its class as it likes.
    own = brought.get("AutoModelForCausalLM") if isinstance(brought, Mapping) else None
    for name in named if isinstance(named, list) and len(named) == 1 else ():
        if isinstance(name, str) and name in known.values() and (not own or str(own).endswith(f".{name}")):
            return name, class_called(name).config_class
    if isinstance(model_type, str) and model_type in known:
        return known[model_type], class_called(known[model_type]).config_class
    raise ConfigError(
        f"there is no definition for the model type {model_type!r}",
        code="model-type",
        file="config.json",
        tensor="model_type",
        expected="a type with a page here, or a decoder of the installed transformers",
        found=f"{model_type!r}, architectures {named!r}",
        fix=nearest(str(model_type), known) or "Code that a checkpoint brings along is never run.",
    )


def class_called(name: str) -> Any:
    """Return transformers' class of this name.  ConfigError where it cannot be imported."""
    import transformers

    try:
        return getattr(transformers, name)
    except (AttributeError, ImportError, RuntimeError) as error:
        raise ConfigError(
            f"transformers' {name} cannot be imported",
            code="model-type",
            file="config.json",
            tensor="architectures",
            found=str(error)[:300],
        ) from error


def build_on_meta(config: GenericConfig, dtype: torch.dtype, attention: str) -> nn.Module:
    """Build the class's model: parameters on the meta device, buffers that are computed on the CPU.

    attention: the name of the attention function that the model is to call.
    """
    made = class_called(config.architecture) if config.made is None else config.made
    model = build_class(made, config.architecture, config.hf, dtype, attention)
    _compute_buffers(model)
    return model.eval().requires_grad_(False)


def build_class(made: Any, name: str, hf: Any, dtype: torch.dtype, attention: str) -> Any:
    """Build a class's model on the meta device.  ConfigError where it cannot be built.

    made: the class.  name: what errors call it.  hf: its config.  dtype, attention: as for `build_on_meta`.
    """
    with BUILDING:
        return _build(made, name, hf, dtype, attention)


def _build(made: Any, name: str, hf: Any, dtype: torch.dtype, attention: str) -> Any:
    from transformers.initialization import no_init_weights

    model: Any

    def build(attention: str) -> Any:
        own = copy.deepcopy(hf)
        own._attn_implementation = attention
        # Experts that look nothing up, so that they run on the meta device.
        own._experts_implementation = "batched_mm"
        return made(own)

    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device("meta"), no_init_weights():
            try:
                model = build(attention)
            except KeyError:  # a class that chooses among attentions of its own
                model = build("eager")
        if _plain_tensors(model):
            with torch.device("cpu"), no_init_weights(), _parameters_on_meta():
                _copy_plain_tensors(build("eager"), model)
    except Exception as error:
        raise ConfigError(
            f"transformers' {name} cannot be built from this config.json",
            code="config-value",
            file="config.json",
            tensor="architectures",
            found=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
        ) from error
    finally:
        torch.set_default_dtype(before)
    return model


def _plain_tensors(model: nn.Module) -> list[tuple[str, str]]:
    """List the tensors that modules hold as neither parameter nor buffer, and that have no data: module, attribute."""
    return [
        (path, name)
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, torch.Tensor) and value.is_meta
    ]


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Have modules drop the data of each parameter as they register it, and compute all else."""
    register = nn.Module.register_parameter

    def drop(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, None if param is None else nn.Parameter(param.to("meta"), requires_grad=False))

    nn.Module.register_parameter = drop  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _copy_plain_tensors(source: nn.Module, target: nn.Module) -> None:
    for path, name in _plain_tensors(target):
        setattr(target.get_submodule(path), name, getattr(source.get_submodule(path), name))


def _compute_buffers(model: Any) -> None:
    """Give the buffers that no checkpoint has their values, by the initialisation of the (sub)model they stand in.

    ConfigError for a buffer that no initialisation fills.
    """
    from transformers import PreTrainedModel

    owners: dict[str, Any] = {}
    fresh: dict[str, dict[str, torch.Tensor]] = {}  # of each module, by its name
    for path, module in model.named_modules():
        owners[path] = module if isinstance(module, PreTrainedModel) else owners[path.rpartition(".")[0]]
        for name in module._non_persistent_buffers_set:
            if module._buffers.get(name) is not None:
                empty = _unset(torch.empty_like(module._buffers[name], device="cpu"))
                fresh.setdefault(path, {})[name] = module._buffers[name] = empty
    with torch.no_grad(), torch.device("cpu"):
        for path in fresh:
            owners[path]._init_weights(model.get_submodule(path))
        # A model may fill the buffers of the modules in it.
        for path, module in model.named_modules() if _still_unset(model, fresh) else ():
            if path not in fresh and any(name.startswith(f"{path}." if path else "") for name in fresh):
                owners[path]._init_weights(module)
    unset = _still_unset(model, fresh)
    if unset:
        raise ConfigError(
            f"transformers' {type(model).__name__} has a buffer that its own initialisation does not fill",
            code="model-type",
            file="config.json",
            tensor=unset[0],
            expected="a value that follows from the config",
            found="none",
        )


def _unset(tensor: torch.Tensor) -> torch.Tensor:
    """Fill a tensor with what no initialisation writes."""
    if tensor.dtype is torch.bool:
        return tensor.view(torch.uint8).fill_(255).view(torch.bool)
    return tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min)


def _still_unset(model: Any, fresh: Mapping[str, Mapping[str, torch.Tensor]]) -> list[str]:
    """List the buffers that hold what `_unset` wrote."""
    found = []
    for path, buffers in fresh.items():
        for name in buffers:
            buffer = model.get_submodule(path)._buffers[name]
            raw = buffer.view(torch.uint8) if buffer.dtype is torch.bool else buffer
            if (buffer.numel() and bool((raw == _unset(torch.empty_like(buffer)).view(raw.dtype)).any())) or (
                buffer.is_floating_point() and bool(buffer.isnan().any())
            ):
                found.append(f"{path}.{name}")
    return found


def takes(module: nn.Module, argument: str) -> bool:
    """Tell whether a module's forward has an argument of this name."""
    own, kind = vars(module).get("forward"), cast(Any, type(module))
    return argument in (_arguments_of(kind) if own is None else inspect.signature(own).parameters)


@functools.cache
def _arguments_of(kind: Any) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)


def on_cpu(function: Callable[P, R]) -> Callable[P, R]:
    """Have a function make its tensors on the CPU, also where models are built on the meta device."""

    @functools.wraps(function)
    def run(*args: P.args, **options: P.kwargs) -> R:
        with torch.device("cpu"):
            return function(*args, **options)

    return run
