"""Wrappers of images, sounds and text: which text model they hold, what its tensors are called, and what is not run.

A wrapper's config.json has the text model's config inside (`text_config`). Only the text model runs: by its page here,
or as transformers' class of it. Names come from transformers' class of the wrapper, built on the meta device: what the
class has outside of its language model is not run. A class that transformers does not have is taken apart by where its
table of tokens lies (`UnknownWrapper`).
"""

# H hidden size

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pymllm.errors import CheckpointError, ConfigError
from pymllm.models.generic.classes import GenericConfig, build_class, class_called, decoders, read_hf_config
from pymllm.models.generic.model import run_head
from pymllm.models.generic.names import add_once, names_in_class, rename, stored_spelling
from pymllm.models.generic.probe import find_base
from pymllm.models.generic.text_only import make_text_only
from pymllm.weights.tensor_file import TensorInfo

# What configs of wrappers whose class transformers does not have call the text model's config.
TEXT_CONFIGS = ("text_config", "llm_config", "language_config")
# A word in a module's name, and what the module is.
PARTS = {
    "project": "the projector",
    "connector": "the projector",
    "merger": "the projector",
    "audio": "the audio tower",
    "speech": "the audio tower",
    "vis": "the vision tower",
    "image": "the vision tower",
    "mlp1": "the projector",
}
TEXT = re.compile(r"(^|\.)(layers\.\d+\.(self_attn|mlp)\.|embed_tokens\.|lm_head\.)")
# What makes logits of hidden states, and no more.
HARMLESS = {"linear", "__getitem__", "__get__", "__len__", "float", "new_zeros"}


class Wrapper:
    """A wrapper of transformers'.

    architecture: its class.  hf: transformers' config of it.  text: that of the text model inside.  raw: the text
    model's config as a config.json has it.
    """

    def __init__(self, architecture: str, hf: Any, text: Any, outer: Mapping[str, Any]) -> None:
        self.architecture, self.hf, self.text = architecture, hf, text
        self.full: dict[str, str] = {}
        text.tie_word_embeddings = self._tied(outer)
        self.raw: dict[str, Any] = {**text.to_dict(), "tie_word_embeddings": text.tie_word_embeddings}
        dtype = self.raw.get("dtype") or outer.get("dtype", outer.get("torch_dtype"))
        self.raw = {**self.raw, "dtype": dtype} if dtype is not None else self.raw
        for name in ("architectures", "quantization_config", "auto_map", "torch_dtype"):
            self.raw.pop(name, None)

    @functools.cached_property
    def skeleton(self) -> Any:
        """The class's model without data."""
        with unbuilt_as_empty():
            return build_class(
                class_called(self.architecture), self.architecture, self.hf, torch.float32, "eager"
            )

    @functools.cached_property
    def decoder(self) -> Any:
        """The text model in the class's model."""
        return self.skeleton.get_decoder()

    @functools.cached_property
    def head(self) -> Any:
        """The layer that makes logits."""
        found = self.skeleton.get_output_embeddings()
        return found if found is not None else self.decoder.get_output_embeddings()

    @functools.cached_property
    def places(self) -> tuple[str, str]:
        """The names of the text model without its head, and of the head."""
        names = {id(module): name for name, module in self.skeleton.named_modules()}
        inner = self.decoder.get_decoder() if self.holds_head else self.decoder
        place, head = names.get(id(inner), ""), names.get(id(self.head), "")
        if not place or not head:
            raise ConfigError(
                f"transformers' {self.architecture} does not say which of its modules are the text model and its head",
                code="model-type",
                file="config.json",
                tensor="architectures",
                found=f"{type(self.decoder).__name__}, {type(self.head).__name__}",
            )
        return place, head

    @property
    def holds_head(self) -> bool:
        """True if the text model that the class holds has the head in it."""
        return any(module is self.head for module in self.decoder.modules())

    def generic_config(self) -> GenericConfig:
        """Return the text model's config for its own class of transformers, or for one made of its model and a head."""
        if self.holds_head:
            return GenericConfig(self.raw, type(self.decoder).__name__, self.text, type(self.decoder))
        if self.text_class is not None and self.has_own_logits:
            return GenericConfig(self.raw, self.text_class, self.text)
        calls = self._head_calls
        if not isinstance(self.head, nn.Linear) or calls is None or calls:
            raise ConfigError(
                f"transformers' {self.architecture} has no text model of its own, and does more than apply a head",
                code="model-type",
                file="config.json",
                tensor="architectures",
                expected="logits that are the head's product with hidden states",
                found="a forward that cannot be followed" if calls is None else ", ".join(sorted(calls)),
            )
        made = make_text_only(type(self.decoder), self.head.bias is not None)
        return GenericConfig(
            self.raw, f"{type(self.decoder).__name__} of {self.architecture}", self.text, made
        )

    @property
    def text_class(self) -> str | None:
        """The text model's own class with a head, by name; None: transformers has none."""
        name = decoders().get(self.text.model_type)
        return name if name is not None and class_called(name).config_class is type(self.text) else None

    @functools.cached_property
    def has_own_logits(self) -> bool:
        """True if the text model's own class makes logits of hidden states as the wrapper does.

        Cohere 2's scales them, where its wrapper does not.
        """
        if self.holds_head or self.text_class is None or self._head_calls is None:
            return True
        text = build_class(class_called(self.text_class), self.text_class, self.text, torch.float32, "eager")
        return _calls_after(text) == self._head_calls

    @functools.cached_property
    def _head_calls(self) -> set[str] | None:
        return _calls_after(self.skeleton)

    def rename(self, tensors: Mapping[str, TensorInfo], config: Any) -> dict[str, TensorInfo]:
        """Give the tensors of a checkpoint the names that the text model has for them.

        config: the text model's.  `full` has the names that the wrapper's class has for them, by the new ones.
        CheckpointError where two tensors would have one name.
        """
        full = names_in_class(self.skeleton, tensors)
        inside = tuple(f"{place}." for place in self.places)
        text = {name: info for name, info in tensors.items() if full[name][1].startswith(inside)}
        found = {name: info for name, info in tensors.items() if name not in text}
        self.full = {name: full[name][1] for name in found}
        if isinstance(config, GenericConfig):
            for name, info in rename(self.skeleton, text).items():
                short = self._move(name, *config.places)
                add_once(found, short, info)
                self.full[short] = name
            return found
        for name, info in text.items():
            short = self._tail(full[name][0], name)
            add_once(found, short, info)
            self.full[short] = full[name][0]
        return found

    def spelling(self, config: Any, pairs: Iterable[tuple[str, str]]) -> Callable[[str, str], str]:
        """Return what says how a tensor that is not there would be stored, by its name in the text model and a guess.

        config: the text model's.  pairs: (name in the text model, stored name) of those that are there.
        """
        spell = stored_spelling(
            self.skeleton, [(self.full.get(mine, mine), stored) for mine, stored in pairs]
        )
        base, head = config.places if isinstance(config, GenericConfig) else ("model", "lm_head")

        def whole(name: str) -> str:
            for mine, theirs in zip(self.places[::-1], (head, base), strict=True):
                if name.startswith(f"{theirs}.".removeprefix(".")):
                    return f"{mine}.{name.removeprefix(f'{theirs}.')}"
            return name

        return lambda name, guess: spell(whole(name), guess)

    def _move(self, name: str, base: str, head: str) -> str:
        for mine, theirs in zip(self.places, (base, head), strict=True):
            if name.startswith(f"{mine}."):
                return f"{theirs}.{name.removeprefix(f'{mine}.')}".removeprefix(".")
        return name

    def _tail(self, name: str, stored: str) -> str:
        """Return a page's name of a tensor: all that the checkpoint calls it from the text model's own modules on."""
        moved = self._move(name, "model", "lm_head")
        if moved == name:
            return name
        first, segments = moved.split(".")[0 if moved.startswith("lm_head.") else 1], stored.split(".")
        if first not in segments:
            return moved
        tail = ".".join(segments[segments.index(first) :])
        return tail if moved.startswith("lm_head.") else f"model.{tail}"

    def why_not_run(self, tensor: str) -> str | None:
        """Return why a tensor is of a part that the class has outside of its text model, or None: it is not.

        tensor: its name after `rename`, which is to be done before.
        """
        name = self.full.get(tensor, tensor)
        module, _, suffix = name.rpartition(".")
        if name.startswith(tuple(f"{place}." for place in self.places)):
            return None
        weight = getattr(self.modules.get(module), "weight", None)
        quantised = isinstance(weight, nn.Parameter) and suffix in self.suffixes
        unbuilt = any(isinstance(self.modules.get(above), _Unbuilt) for above in _ancestors(module))
        if not (name in self.known or quantised or unbuilt):
            return None
        return _reason(name, self._common())

    @functools.cached_property
    def known(self) -> Set[str]:
        """The names of the tensors of the whole class."""
        return self.skeleton.state_dict().keys()  # type: ignore[no-any-return]

    @functools.cached_property
    def modules(self) -> dict[str, nn.Module]:
        return dict(self.skeleton.named_modules())

    @functools.cached_property
    def suffixes(self) -> set[str]:
        """The last words of the names of the text model's tensors, those of quantised layers too."""
        inside = tuple(f"{place}." for place in self.places)
        return {name.rpartition(".")[2] for name in self.full.values() if name.startswith(inside)}

    def _common(self) -> str:
        """Return the name of what holds the text model and the rest."""
        return self.places[0].rpartition(".")[0]

    def _tied(self, outer: Mapping[str, Any]) -> bool:
        """Tell whether the head is tied: as the wrapper's config says, else the text model's, else the class."""
        nested = (outer[name] for name in TEXT_CONFIGS if isinstance(outer.get(name), Mapping))
        inner: Mapping[str, Any] = next(nested, {})
        for source in (outer, inner):
            if isinstance(source.get("tie_word_embeddings"), bool):
                return source["tie_word_embeddings"]  # type: ignore[no-any-return]
        return bool(getattr(self.hf, "tie_word_embeddings", False))


class UnknownWrapper:
    """A wrapper that transformers has no class of, around a text model that is known.

    architecture: what the config calls the class.  raw: the text model's config.
    """

    def __init__(self, architecture: str, raw: Mapping[str, Any], outer: Mapping[str, Any]) -> None:
        self.architecture = architecture
        self.full: dict[str, str] = {}
        dtype = raw.get("dtype", raw.get("torch_dtype", outer.get("dtype", outer.get("torch_dtype"))))
        left_out = ("architectures", "quantization_config", "auto_map", "torch_dtype", "dtype")
        self.raw = {key: value for key, value in raw.items() if key not in left_out}
        self.raw |= {} if dtype is None else {"dtype": dtype}
        for source in (raw, outer):
            if isinstance(source.get("tie_word_embeddings"), bool):
                self.raw["tie_word_embeddings"] = source["tie_word_embeddings"]
        self.root = ""  # the first word of the names of the text model's tensors

    def rename(self, tensors: Mapping[str, TensorInfo], config: Any) -> dict[str, TensorInfo]:
        """Give the tensors of a checkpoint the names that the text model has for them, as `Wrapper.rename` does."""
        tables = [name for name in tensors if name.endswith(".embed_tokens.weight")]
        if len(tables) != 1:
            raise CheckpointError(
                f"there is no class {self.architecture} here, and its text model is not to be found by its embedding",
                code="model-type",
                file="config.json",
                tensor="architectures",
                expected="one tensor called embed_tokens.weight",
                found=", ".join(tables[:4]) or "none",
            )
        place = tables[0].removesuffix(".embed_tokens.weight")
        self.root = place.partition(".")[0]
        head = place.rpartition(".")[0]
        prefixes = {f"{place}.": "model.", f"{head}.lm_head.".removeprefix("."): "lm_head."}
        found: dict[str, TensorInfo] = {}
        for name, info in tensors.items():
            before, after = next(((b, a) for b, a in prefixes.items() if name.startswith(b)), ("", ""))
            add_once(found, after + name.removeprefix(before), info)
        return found

    def why_not_run(self, tensor: str) -> str | None:
        """Return why a tensor outside of the text model is not run, as `Wrapper.why_not_run` does.

        One that ends as a tensor of the text model does may be meant for it, and has no reason.
        """
        if tensor.partition(".")[0] in (self.root, "model", "lm_head"):
            return None
        if _part(tensor) is None and TEXT.search(tensor) is not None:
            return None
        return f"it lies outside of {self.root}, the text model of {self.architecture}"


def read_wrapper(raw: Mapping[str, Any]) -> Wrapper | UnknownWrapper | None:
    """Read a config.json as that of a wrapper.  None: it is none.

    ConfigError where transformers does not take the config, or runs an encoder beside the text model.
    """
    name = _wrapper_class(raw)
    if name is None:
        return _read_unknown(raw)
    hf = read_hf_config(name, class_called(name).config_class, raw)
    text = hf.get_text_config(decoder=True)
    if text is hf:
        return None
    if getattr(text, "is_encoder_decoder", False) or getattr(hf, "is_encoder_decoder", False):
        raise ConfigError(
            f"transformers' {name} has an encoder, which its text model needs",
            code="model-type",
            file="config.json",
            tensor="architectures",
            expected="a decoder",
            found=name,
        )
    return Wrapper(name, hf, text, raw)


def _wrapper_class(raw: Mapping[str, Any]) -> str | None:
    """Find the class of a wrapper that a config.json names: by `architectures`, then by `model_type`."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

    known = dict(MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES)
    listed = raw.get("architectures")
    named = [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
    found = [name for name in named if name in {*known.values(), *decoders().values()}]
    model_type = raw.get("model_type")
    found += [known[model_type]] if isinstance(model_type, str) and model_type in known else []
    for name in found:
        if getattr(class_called(name).config_class, "sub_configs", None):
            return name
    return None


def _read_unknown(raw: Mapping[str, Any]) -> UnknownWrapper | None:
    from transformers import CONFIG_MAPPING

    text = next((raw[name] for name in TEXT_CONFIGS if isinstance(raw.get(name), Mapping)), None)
    if text is None or raw.get("model_type") in CONFIG_MAPPING or text.get("model_type") not in decoders():
        return None
    listed = raw.get("architectures")
    name = listed[0] if isinstance(listed, list) and listed else raw.get("model_type")
    return UnknownWrapper(str(name), text, raw)


class _Unbuilt(nn.Module):
    """A part of a wrapper that cannot be built here, as a package that it needs is missing: it is not run."""


@contextmanager
def unbuilt_as_empty() -> Iterator[None]:
    """Build classes whose towers need packages that are not installed: such a tower has no modules then."""
    from transformers import AutoModel

    build, before = AutoModel.from_config, vars(AutoModel).get("from_config")

    def from_config(config: Any, **options: Any) -> Any:
        try:
            return build(config, **options)
        except ImportError:
            return _Unbuilt()

    setattr(AutoModel, "from_config", from_config)  # noqa: B010
    try:
        yield
    finally:
        if before is None:
            delattr(AutoModel, "from_config")
        else:
            setattr(AutoModel, "from_config", before)  # noqa: B010


def _ancestors(name: str) -> Iterator[str]:
    while name:
        yield name
        name = name.rpartition(".")[0]


def _part(name: str) -> str | None:
    """Name the part of a wrapper that a tensor belongs to, by a word in its name.  None: no word is known."""
    return next((part for word, part in PARTS.items() if word in name), None)


def _reason(name: str, common: str) -> str:
    """Say which part of a wrapper is not run.  common: the name of what holds all parts."""
    below = name.removeprefix(f"{common}.") if common and name.startswith(f"{common}.") else name
    place = f"{common}.{below.split('.')[0]}" if below != name else below.split(".")[0]
    part = _part(below.split(".")[0]) or _part(below)
    return (
        f"{part} is not run"
        if part is not None
        else f"{place}, which is for other inputs than text, is not run"
    )


def _calls_after(model: Any) -> set[str] | None:
    """List what a class's forward does with the hidden states of its inner model besides applying a head.

    None: it cannot be followed.
    """
    base = find_base(model)
    if base is None:
        return None
    calls: set[str] = set()

    class Watch(TorchFunctionMode):
        def __torch_function__(
            self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            tensors = [one for one in args if isinstance(one, Tensor)]
            if any(tensor.is_meta and tensor.is_floating_point() for tensor in tensors):
                calls.add(getattr(func, "__name__", str(func)))
            return func(*args, **(kwargs or {}))

    width = model.get_output_embeddings().in_features
    try:
        with Watch():
            run_head(model, base, torch.empty((2, width), device="meta"))
    except Exception:
        return None
    return calls - HARMLESS
