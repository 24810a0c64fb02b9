"""A run of transformers' model on the meta device: how its modules are called, and if requests may lie side by side.

Nothing is taken from names or settings: an attention module's heads, scale, window, soft cap and sinks are those that
it hands to the attention function in this run. Whatever else looks at several tokens at once (a recurrence, a
convolution, an attention of the class's own) is found by the shapes of what it computes.
"""

# T tokens of the run, H query heads, Hkv key heads, D head size, Dv value head size

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from pymllm.layers.held import WeightHolder
from pymllm.models.generic.alike import repeated_once
from pymllm.models.generic.classes import on_cpu, takes

# Prime numbers of tokens, of which one is taken that no dimension of the model is near.
LENGTHS = (1009, 983, 953, 919, 887, 503, 479, 457, 431, 307, 281, 269, 251, 239, 227, 211, 179, 163, 149)
SHORT_LENGTHS = (113, 101, 89, 79, 71, 61, 53, 43, 37, 31, 23, 19, 13)  # for models of few positions
STEPS = 8  # how many tokens a model may look at by themselves
NEAR = 8  # a convolution's result is longer by its padding

MORE = 3000  # operations that are looked at after a refusal: enough to see if the first layer is an encoder's
FUTURE = "sees tokens that come after its own"  # as an encoder's does

# What a module's forward calls the memory of a request.
MEMORIES = ("past_key_values", "past_key_value", "cache_params", "layer_past", "state", "cache", "mems")

# What attention functions are given that changes nothing here.
HARMLESS = {
    *(
        "position_ids",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "cache_position",
        "is_causal",
    ),
    *("return_dict", "position_embeddings", "num_items_in_batch", "past_key_values", "output_router_logits"),
}


@dataclass(frozen=True)
class AskedMask:
    """The mask that a layer of transformers asks for.

    window: how many positions a query sees; None: all up to its own.  why_not: why it is not such a mask.
    """

    window: int | None = None
    why_not: str | None = None


@dataclass(frozen=True)
class AttentionCall:
    """One call of the attention function: the sizes and settings of `pymllm.attention.Attention`."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_head_dim: int
    scale: float
    window: int | None
    soft_cap: float | None
    sinks: bool


@dataclass
class Probe:
    """The findings of a run.

    tokens: T.  base: the module that makes the hidden states, by name.
    attention: the calls of each attention module, by name.
    inputs: what each linear layer and embedding was called with; one that is missing was never called.
    versions: how often each of these tensors had been written to.  given: how many arguments each module was given.
    contiguous: whether outputs of linear layers must have no gaps.  failed: whether the run came to no end.
    steps: how often one token was taken out of all.
    why_not: why requests cannot be run side by side; None: they can.
    """

    tokens: int
    base: str = ""
    attention: dict[str, list[AttentionCall]] = field(default_factory=dict)
    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    versions: dict[str, list[int]] = field(default_factory=dict)
    given: dict[str, list[int]] = field(default_factory=dict)
    contiguous: bool = False
    failed: bool = False
    steps: int = 0
    why_not: str | None = None

    def refuse(self, reason: str) -> None:
        """Note why requests cannot be run side by side; the first reason stays, but for that of an encoder."""
        if self.why_not is None or (FUTURE in reason and FUTURE not in self.why_not):
            self.why_not = reason


_running: ContextVar[Probe | None] = ContextVar("probe", default=None)
_names: ContextVar[Mapping[int, str]] = ContextVar("probe_names")


def probing() -> Probe | None:
    """Return the probe that runs now, or None."""
    return _running.get()


class _Called(Exception):
    def __init__(self, name: str) -> None:
        self.name = name


@on_cpu
def find_base(model: Any) -> str | None:
    """Find the module that the class's forward calls first for hidden states, by name.  None: there is none."""
    from transformers import PreTrainedModel

    def stop(name: str) -> Callable[..., Any]:
        def forward(*_: Any, **__: Any) -> Any:
            raise _Called(name)

        return forward

    stopped = [(n, m) for n, m in model.named_modules() if isinstance(m, PreTrainedModel) and m is not model]
    stopped += [(n, m) for n, m in model.named_children() if not isinstance(m, PreTrainedModel)]
    for name, module in stopped:
        module.forward = stop(name)
    try:
        model(**run_arguments(model, torch.zeros((1, 2), dtype=torch.int64), torch.arange(2)[None]))
    except _Called as called:
        return called.name
    except Exception:
        return None
    finally:
        for _, module in stopped:
            del module.forward
    return None


def probe(model: Any, longest: int) -> Probe:
    """Run the class's model on the meta device, without a cache, and note what its modules are called with.

    Linear layers give outputs with gaps, as parts of a product do; a model that cannot run so runs again without.
    longest: the most positions that the model has.
    """
    found = _probe(model, longest, gaps=True)
    if found.failed:
        found = _probe(model, longest, gaps=False)
        found.contiguous = True
    return found


@on_cpu
def _probe(model: Any, longest: int, gaps: bool) -> Probe:
    sides = {side for param in model.parameters() for side in param.shape}
    far = (
        n
        for n in (*LENGTHS, *SHORT_LENGTHS)
        if n <= longest and not any(n - 2 < side < n + NEAR for side in sides)
    )
    found = Probe(next(far, 1))
    base = find_base(model)
    if base is None:
        found.refuse("its forward calls no model for its hidden states")
        return found
    found.base = base
    inner = model.get_submodule(base)
    if positions_of_ids(inner):
        found.refuse("it makes positions of the ids of tokens")
    if any(_by_length(module) for module in model.modules()):
        found.refuse("its rotary positions change with the length of the text")
    names = {id(module): name for name, module in model.named_modules()}
    running, named = _running.set(found), _names.set(names)
    try:
        ids = torch.zeros((1, found.tokens), dtype=torch.int64, device="meta")
        arguments = run_arguments(inner, ids, torch.arange(found.tokens)[None])
        with (
            torch.no_grad(),
            tensors_kept(model),
            _Watch(found),
            repeated_once(inner) as repeated,
            _noted(model, found, gaps),
        ):
            inner(**arguments)
        for name, first in repeated.items():
            _repeat(
                found, f"{base}.{first}." if base else f"{first}.", f"{base}.{name}." if base else f"{name}."
            )
    except Exception as error:
        found.failed = True
        found.refuse(
            f"it cannot be run without data: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
        )
    finally:
        _running.reset(running)
        _names.reset(named)
    if found.attention and not takes(inner, "position_ids"):
        found.refuse("it takes no positions, but counts tokens itself")
    for name in _unseen_memories(model, found):
        found.refuse(f"{name} ({type(model.get_submodule(name)).__name__}) keeps a memory of its own")
    return found


@contextlib.contextmanager
def tensors_kept(model: nn.Module) -> Iterator[list[tuple[dict[str, Any], str, Any, Tensor]]]:
    """Give modules back the tensors that they had, beside parameters: a forward may put others in their places.

    Yields a list that has, at the end, what the forward replaced: the attributes of a module, a name, what it was, and
    what the forward made of it.
    """
    replaced: list[tuple[dict[str, Any], str, Any, Tensor]] = []
    held = [
        (place, dict(place)) for module in model.modules() for place in (module.__dict__, module._buffers)
    ]
    try:
        yield replaced
    finally:
        for place, before in held:
            for name, value in list(place.items()):
                if isinstance(value, Tensor) and value is not before.get(name):
                    replaced.append((place, name, before.get(name), value))
                    place[name] = before.get(name)


def positions_of_ids(model: nn.Module) -> bool:
    """Tell whether a model makes its positions of the tokens' ids, among which padding has none (RoBERTa's kind)."""
    return any(hasattr(module, "create_position_ids_from_input_ids") for module in model.modules())


def _repeat(found: Probe, first: str, name: str) -> None:
    """Note for a module what was noted for one that is alike.  first, name: what the names of their modules begin with.

    Inputs that are one tensor there are one here, and another one than there.
    """
    made: dict[int, Tensor] = {}
    for path in [path for path in found.inputs if path.startswith(first)]:
        inputs = [made.setdefault(id(x), x.detach()) for x in found.inputs[path]]
        found.inputs[name + path.removeprefix(first)] = inputs
        found.versions[name + path.removeprefix(first)] = list(found.versions[path])
    for path in [path for path in found.given if path.startswith(first)]:
        found.given[name + path.removeprefix(first)] = list(found.given[path])
    for path in [path for path in found.attention if path.startswith(first)]:
        found.attention[name + path.removeprefix(first)] = list(found.attention[path])


def _by_length(module: Any) -> bool:
    """Tell whether a module makes rotary positions that depend on how long the text is."""
    kinds = getattr(module, "rope_type", None)
    kinds = kinds.values() if isinstance(kinds, Mapping) else [kinds]
    return any(kind == "longrope" or "dynamic" in str(kind) for kind in kinds)


def run_arguments(module: nn.Module, ids: Tensor, positions: Tensor) -> dict[str, Any]:
    """Return the arguments of a run without a cache, those that the module takes."""
    wanted = {"input_ids": ids, "position_ids": positions, "use_cache": False, "return_dict": True}
    return {name: value for name, value in wanted.items() if takes(module, name)}


@contextlib.contextmanager
def _noted(model: nn.Module, found: Probe, gaps: bool) -> Iterator[None]:
    """Note what modules are called with, for the time of a `with` block.

    gaps: whether linear layers give outputs with gaps.
    """

    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(_note_call(found, name), with_kwargs=True))
        if isinstance(module, (nn.Linear, nn.Embedding)) or type(module).__name__ == "Conv1D":
            hooks.append(module.register_forward_pre_hook(_note_input(found, name), with_kwargs=True))
        if gaps and isinstance(module, nn.Linear):
            hooks.append(module.register_forward_hook(_spread))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _note_input(found: Probe, name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        x = next(iter(tree_leaves((args, kwargs))))
        found.inputs.setdefault(name, []).append(x)
        found.versions.setdefault(name, []).append(x._version)

    return hook


def _note_call(found: Probe, name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        found.given.setdefault(name, []).append(len(args) + len(kwargs))

    return hook


def _spread(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """Return a tensor like a linear layer's output, with gaps between its rows."""
    strides = [1]
    for index, side in enumerate(reversed(output.shape[1:])):
        strides.append(strides[-1] * side if index else side + 1)
    return torch.empty_strided(output.shape, strides[::-1], dtype=output.dtype, device=output.device)


def _unseen_memories(model: nn.Module, found: Probe) -> list[str]:
    """List the innermost modules that take a request's memory, and use neither our attention nor our recurrences."""
    keepers = [n for n, m in model.named_modules() if n and any(takes(m, memory) for memory in MEMORIES)]
    inner = [n for n in keepers if not any(other.startswith(f"{n}.") for other in keepers)]
    inner = [n for n in inner if _uses_memory(model.get_submodule(n))]
    ours = [
        *found.attention,
        *(n for n, m in model.named_modules() if isinstance(m, WeightHolder) and m.state_bytes()),
    ]
    return [n for n in inner if not any(f"{name}.".startswith(f"{n}.") for name in ours)]


def _uses_memory(module: nn.Module) -> bool:
    """Tell whether a module reads or writes a request's memory itself; else it hands it on, or leaves it alone."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    if code is None or any(takes(module, memory) for memory in MEMORIES[3:]):
        return True
    return any(
        name.startswith(("update", "get_", "conv_state", "ssm_state", "recurrent_state"))
        for name in code.co_names
    )


class OnMeta(TorchFunctionMode):
    """The mode of runs without data: what meets a meta tensor becomes one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in tree_leaves((args, kwargs))):
            if func is Tensor.__contains__:
                return False  # asked of ids, for a warning about padding or the place of an image
            args, kwargs = tree_map(_on_meta, (args, kwargs))
        return func(*args, **kwargs)


class _Watch(OnMeta):
    """The mode of a probe, which also notes what depends on several tokens."""

    def __init__(self, found: Probe) -> None:
        super().__init__()
        self.found, self.more = found, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        if self.found.why_not is not None:
            self.more += 1
            if self.more > MORE:
                raise StopIteration("nothing more to learn")
        elif isinstance(result, Tensor):
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self._look(func, result, tensors)
        return result

    def _look(self, func: Any, result: Tensor, tensors: list[Tensor]) -> None:
        shape, name, tokens = result.shape, getattr(func, "__name__", ""), self.found.tokens
        if name == "arange" and shape[0] == tokens:
            self.found.refuse("it counts tokens itself")
        if not (result.is_floating_point() and result.is_meta):
            return
        if _has_tokens(tokens, *tensors) and not _has_tokens(tokens, result):
            if name not in ("__getitem__", "select", "unbind"):
                self.found.refuse(f"it mixes tokens: {name} makes {list(shape)} of {tokens} tokens")
            self.found.steps += 1
            if self.found.steps > STEPS:
                self.found.refuse("it goes through its tokens one by one")
        near = any(tokens - 1 <= side < tokens + NEAR and side != tokens for side in shape)
        if len(shape) > 2 and shape[-1] == shape[-2] == tokens:
            self.found.refuse(f"it computes attention itself ({name})")
        elif name in ("cumsum", "conv1d", "roll", "flip", "cumprod") and tokens in shape:
            self.found.refuse(f"it mixes tokens by {name}")
        elif near and any(tokens in tensor.shape for tensor in tensors):
            self.found.refuse(f"it mixes tokens: {name} makes {list(shape)} of {tokens} tokens")


def _has_tokens(tokens: int, *tensors: Tensor) -> bool:
    """Tell whether a dimension of any tensor counts tokens, or something of each."""
    return any(side and side % tokens == 0 for tensor in tensors for side in tensor.shape)


def _on_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) and not value.is_meta else value


def note_attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, settings: Mapping[str, Any]
) -> Tensor:
    """Note a call of the attention function.  q: [1, H, T, D], k: [1, Hkv, T, D], v: [1, Hkv, T, Dv].

    Returns a result of its shape, [1, T, H, Dv].
    """
    found = _running.get()
    assert found is not None
    name = _names.get().get(id(module), "")
    given = {key: value for key, value in settings.items() if value is not None and key not in HARMLESS}
    scale, sinks = given.pop("scaling", q.shape[-1] ** -0.5), given.pop("s_aux", None)
    soft_cap = given.pop("softcap", None)
    given.pop("dropout", None)
    given.pop("sliding_window", None)  # the mask decides, as in transformers' own attention
    asked = mask if isinstance(mask, AskedMask) else AskedMask()
    if mask is None and not getattr(module, "is_causal", False):
        asked = AskedMask(why_not=FUTURE)
    elif mask is not None and not isinstance(mask, AskedMask):
        asked = AskedMask(why_not="has a mask of its own")
    if q.shape[0] != 1 or q.shape[2] != found.tokens or k.shape[2] != found.tokens:
        found.refuse(f"the attention of {name} has queries {list(q.shape)} and keys {list(k.shape)}")
    if asked.why_not is not None:
        found.refuse(f"the attention of {name} {asked.why_not}")
    if given:
        found.refuse(f"the attention of {name} is given {', '.join(given)}")
    call = AttentionCall(
        q.shape[1],
        k.shape[1],
        q.shape[3],
        v.shape[3],
        float(scale),
        asked.window,
        soft_cap,
        sinks is not None,
    )
    found.attention.setdefault(name, []).append(call)
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]))


@on_cpu
def read_mask(visible: Callable[..., Tensor], length: int = 1 << 17) -> AskedMask:
    """Tell which mask a function of (batch, head, query, key) positions makes.  length: of the texts to try."""
    keys, zero = torch.arange(length), torch.zeros((), dtype=torch.int64)
    windows = []
    for query in (length // 2 - 1, length // 2 + 6, length - 2):
        try:
            seen = visible(zero, zero, torch.tensor(query), keys)
            seen = torch.as_tensor(seen).expand(length)
        except Exception as error:
            return AskedMask(why_not=f"has a mask that cannot be read: {error}")
        count = int(seen.sum())
        if bool(seen[query + 1 :].any()):
            return AskedMask(why_not=FUTURE)
        if not bool(seen[query - count + 1 : query + 1].all()):
            return AskedMask(why_not="sees other tokens than the last ones up to its own")
        windows.append(None if count == query + 1 else count)
    if len(set(windows)) > 1:
        return AskedMask(why_not="sees chunks of the text")
    return AskedMask(windows[0])
