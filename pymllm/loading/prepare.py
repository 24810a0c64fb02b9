"""`prepare`: everything that is decided before a tensor is read.

It builds the model on the meta device, gives every layer its method, and matches every checkpoint tensor with its
place. A plan shows just that (`pymllm.planning.make_plan`); loading executes just that (`pymllm.loading.load`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pymllm.config import Execution, ModelConfig, parse_dtype
from pymllm.disk import names_files
from pymllm.errors import CheckpointError, ConfigError, ShardingError, choices
from pymllm.kernels.hardware import probe_device
from pymllm.kernels.native.extension import native_missing_reason
from pymllm.kernels.native.float_linear import FAST_PATHS, NativeFloatLinear
from pymllm.layers.held import weight_holders
from pymllm.loading.absorbed_heads import join_absorbed_heads
from pymllm.loading.boundary import reading_checkpoint
from pymllm.loading.drafting import check_drafts
from pymllm.loading.head import find_own_head, lacks_head
from pymllm.loading.match import Skipped, Unit, match
from pymllm.loading.side_settings import method_name, refuse_contradictions, side_files
from pymllm.loading.tensor_parallel import legal_tp_sizes
from pymllm.loading.unnamed_settings import read_unnamed_settings
from pymllm.models import (
    build_model,
    find_definition,
    gguf_architectures,
    model_class,
    read_model_config,
    rename_tensors,
)
from pymllm.models.generic.wrappers import TEXT_CONFIGS
from pymllm.models.language_model import LanguageModel
from pymllm.models.strategy import choose_strategy
from pymllm.parallel import Parallel, current_parallel
from pymllm.patterns import bounded_steps
from pymllm.quantization.base import QuantizationConfig, get_quantization_config, list_quantization_methods
from pymllm.quantization.rules import RuledConfig, RuleSource, read_kv_rules, read_rules
from pymllm.quantization.storage.settings import ROOT, Settings
from pymllm.text.end_tokens import end_tokens_of
from pymllm.text.gguf_tokenizer import open_tokenizer
from pymllm.text.tokenizer import read_json
from pymllm.weights.checkpoint import Checkpoint
from pymllm.weights.folder import CONFIG
from pymllm.weights.loader import with_stack_members
from pymllm.weights.opening import open_checkpoint, resolve_model_path
from pymllm.weights.report import TensorRecord

Builder = Callable[[ModelConfig, RuledConfig], LanguageModel]


@dataclass(frozen=True)
class Prepared:
    """A checkpoint about to be loaded: everything is decided, from headers (and, see `head.py`, a tied head) alone.

    config: the model's.  quant: the format and the rules, with the decision for every layer.  parallel: this rank.
    model: without data, on the meta device.  units: what to load, in order.  records: of tensors that are skipped.
    skipped: those of them whose content loading has to look at, and what it may be.
    draft: the second model of draft_model.
    """

    checkpoint: Checkpoint
    config: ModelConfig
    quant: RuledConfig
    execution: Execution
    parallel: Parallel
    model: LanguageModel
    units: tuple[Unit, ...]
    records: tuple[TensorRecord, ...]
    skipped: Skipped = ()
    draft: Prepared | None = None


@names_files
@bounded_steps()
def prepare(
    path: str | Path | None,
    quant: RuleSource = None,
    *,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    compute: str = "auto",
    kernels: Mapping[str, str] | None = None,
    kv_cache: RuleSource = None,
    revision: str | None = None,
    definition: str = "auto",
    strategy: str | None = None,
    build: Builder | None = None,
) -> Prepared:
    """Decide how a checkpoint would be loaded under the current `Parallel`, from its config and headers alone.

    path: a folder of config.json and safetensors files, a .gguf file, or a hub id "org/name".
    quant: rules over the checkpoint's own config; None: as stored.  build: makes the model in place of `build_model`,
    for one that stands in another program.  The others: see `LoadOptions`.
    Raises CheckpointError, ConfigError, RuleError, ShardingError or KernelError.
    """
    place = resolve_model_path(path, revision, download=False)
    # What another program's builder raises is its own.
    with reading_checkpoint(place / CONFIG if place.is_dir() else place) if build is None else nullcontext():
        checkpoint = open_checkpoint(place, gguf_architectures())
        return _prepare(
            checkpoint, quant, device, dtype, compute, kernels, kv_cache, definition, strategy, build
        )


def _prepare(
    checkpoint: Checkpoint,
    quant: RuleSource,
    device: str,
    dtype: str | torch.dtype,
    compute: str,
    kernels: Mapping[str, str] | None,
    kv_cache: RuleSource,
    definition: str,
    strategy: str | None,
    build: Builder | None,
) -> Prepared:
    """Decide as `prepare` does, for an open checkpoint."""
    config = read_model_config(checkpoint.config, definition)
    hoist_settings(checkpoint)
    _check_sizes(config, checkpoint)
    bare = rename_tensors(checkpoint, config)
    head = find_own_head(checkpoint, config)
    if head.own:
        config = config.untied()
    elif find_definition(config.raw) is not None and lacks_head(checkpoint, config, bare):
        config = config.without_head()
    stored = read_quantization_config(checkpoint)
    stored.see_names(checkpoint.names)
    stored.see_checkpoint(with_stack_members(checkpoint.tensors))
    if join_absorbed_heads(checkpoint, stored, config):
        stored.see_checkpoint(with_stack_members(checkpoint.tensors))
    execution = choose_execution(config, stored, device, dtype, compute, kernels)
    generation = read_json(checkpoint.path / "generation_config.json")
    end_tokens_of(checkpoint.config_file, generation, config.raw)  # refused here, where they are none
    decoded = choose_strategy(
        strategy,
        model_class(config).block_diffusion,
        config.raw,
        generation,
        config.size("vocab_size"),
        lambda: open_tokenizer(checkpoint).mask_token,
    )
    execution = replace(
        execution,
        kept_floats=floats_to_keep(checkpoint, execution),
        block_length=decoded.block_length,
    )
    if execution.dtype not in stored.get_supported_act_dtypes():
        raise ConfigError(
            f"the checkpoint's format, {stored.get_name()}, cannot run with {execution.dtype} between layers",
            code="dtype-unsupported",
            expected=" or ".join(
                str(dtype).removeprefix("torch.") for dtype in stored.get_supported_act_dtypes()
            ),
            fix="Choose another dtype.",
        )
    rules = RuledConfig(stored, read_rules(quant), read_kv_rules(kv_cache))
    if head.own:
        rules.sources[config.head_names[0]] = "stored so, although the config ties it to the embedding"
    parallel = current_parallel()
    try:
        model = build_on_meta(config, rules, execution, parallel, build)
    except ShardingError as error:
        if parallel.size == 1:
            raise
        shared, whole = (
            legal_tp_sizes(build_on_meta(config, rules, execution, Parallel(expert_parallel=whole)))
            for whole in (False, True)
        )
        sizes = whole if parallel.expert_parallel else shared
        error.fix = f"Sizes that work for this model: {', '.join(map(str, sizes))}."
        if whole != sizes:
            error.fix += f" With expert_parallel: {', '.join(map(str, whole))}."
        error.args = (str(error),)
        raise
    model.strategy = decoded
    if strategy is not None or model.why_no_text is None:
        refuse_strategy(model)
    config.refuse_ignored()
    rules.lint(model.unreached)
    units, records, skipped = match(model, rules, checkpoint, head.equal)
    draft = None
    if decoded.name == "draft_model":
        draft = prepare(
            decoded.settings["path"], device=device, dtype=dtype, compute=compute, strategy="autoregressive"
        )
        check_drafts(checkpoint, config, draft.checkpoint, draft.model)
        refuse_strategy(draft.model, f"its model {draft.checkpoint.path} cannot draft")
    return Prepared(
        checkpoint, config, rules, execution, parallel, model, units, records, skipped, draft=draft
    )


def refuse_strategy(model: LanguageModel, drafting: str | None = None) -> None:
    """Raise ConfigError where the model cannot be decoded by its strategy.

    drafting: what to say where it cannot draft for another model; None: it does not.
    """
    name = model.strategy.name
    if name == "autoregressive" and drafting is None:
        return
    stateful = any(holder.state_bytes() for _, holder in weight_holders(model))
    why = "layers keep a state of each request, which cannot be taken back" if stateful else None
    if model.keys_depend_on_length:
        why = "its keys depend on how long a request is"
    # A body of a family that is decoded by blocks reads its texts by blocks.
    if model.why_no_text is not None and (drafting is not None or model.strategy.family is None):
        why = "it generates no text"
    if why is not None:
        raise ConfigError(
            f"{drafting or f'this model cannot be decoded by {name}'}: {why}",
            code="strategy",
            tensor=str(model.config.raw.get("model_type")),
            expected="autoregressive",
        )


def hoist_settings(checkpoint: Checkpoint) -> None:
    """Move quantisation settings from the config of a wrapper's text model to where all others are."""
    for name in TEXT_CONFIGS:
        inner = checkpoint.config.get(name)
        if isinstance(inner, Mapping) and inner.get(ROOT) and not checkpoint.config.get(ROOT):
            rest = {key: value for key, value in inner.items() if key != ROOT}
            checkpoint.config = {**checkpoint.config, name: rest, ROOT: inner[ROOT]}


def build_on_meta(
    config: ModelConfig,
    rules: RuledConfig,
    execution: Execution,
    parallel: Parallel,
    build: Builder | None = None,
) -> LanguageModel:
    """Build the model without data, every layer with its method."""
    with execution, parallel, torch.device("meta"):
        return (build or build_model)(config, rules)


def read_quantization_config(checkpoint: Checkpoint) -> QuantizationConfig:
    """Read the checkpoint's own quantisation: from config.json, or from the file that its format writes beside it.

    ConfigError for a format that is not known, settings that it does not have, or two files that differ.
    """
    unnamed = read_unnamed_settings(checkpoint)
    if unnamed is not None:
        return unnamed
    config, older = checkpoint.config, "compression_config"  # as compressed-tensors wrote it at first
    root = older if config.get(older) and not config.get(ROOT) else ROOT
    settings, file = config.get(root) or None, str(checkpoint.config_file)
    if settings is None:
        side = next(side_files(checkpoint.path), None)
        if side is None:
            return get_quantization_config("none").from_config({})
        settings, file, root = {**side.settings, "quant_method": side.name}, str(side.path), ""
    if not isinstance(settings, Mapping):
        raise ConfigError(
            "quantization_config must be an object",
            code="quantization-config",
            file="config.json",
            found=repr(settings),
        )
    name = settings.get("quant_method")
    if name is None:
        raise ConfigError(
            "quantization_config does not name its quant_method",
            code="unknown-method",
            file="config.json",
            tensor="quantization_config.quant_method",
            expected=choices(list_quantization_methods()),
        )
    try:
        format = get_quantization_config(method_name(name))
        wrapped = Settings(settings, file=file, root=root)
        read = format.from_config(wrapped)
    except ConfigError as error:
        if error.file is None or not root:
            error.file = file
        if not root and error.tensor:  # the file has no quantization_config around its settings
            error.tensor = error.tensor.removeprefix(f"{ROOT}.")
        error.args = (str(error),)
        raise
    if root:
        refuse_contradictions(checkpoint.path, wrapped, read)
    return read


def choose_execution(
    config: ModelConfig,
    stored: QuantizationConfig,
    device: str,
    dtype: str | torch.dtype,
    compute: str,
    kernels: Mapping[str, str] | None,
) -> Execution:
    """Choose the device, the activation dtype and the compute mode to run with.

    Keys and values are kept in the checkpoint's own 16 bits where float32 was not asked for, nor compute "exact".

    Asking for float32 is asking for float32 arithmetic: compute "auto" is then "exact".
    dtype "auto" is the checkpoint's own; but float32 on a CPU for a quantised checkpoint, whose weights stay packed
    either way, and whose CPU arithmetic is fastest and most exact in float32; not with compute "checkpoint", as writers
    round activations in the checkpoint's dtype.
    ConfigError for an unknown compute mode, dtype or device.
    """
    if compute not in ("auto", "exact", "checkpoint"):
        raise ConfigError(
            "unknown compute mode", code="compute", expected="auto, exact or checkpoint", found=compute
        )
    where = probe_device(current_parallel().device_of(device))
    if dtype != "auto":
        chosen = parse_dtype(dtype)
        if chosen is torch.float32 and compute == "auto":
            compute = "exact"
    elif where.type == "cpu" and stored.get_name() != "none" and compute != "checkpoint":
        chosen = torch.float32
    else:
        chosen = config.dtype or torch.float32
    narrow = config.dtype in (torch.float16, torch.bfloat16)
    asked = dtype != "auto" or compute == "exact"
    kv_dtype = config.dtype if narrow and chosen is torch.float32 and not asked else None
    return Execution(where.spec, chosen, compute, tuple((kernels or {}).items()), kv_dtype)


def floats_to_keep(checkpoint: Checkpoint, execution: Execution) -> dict[str, torch.dtype]:
    """Return the dtypes, by name, of the 16-bit tensors that stay so under float32 arithmetic.

    There are some where a kernel widens them as it reads them: the native one, on a CPU with a fast path for that.
    """
    forced = execution.forced_kernel("linear") not in (None, NativeFloatLinear.name)
    if execution.dtype is not torch.float32 or execution.device != "cpu" or forced:
        return {}
    if native_missing_reason() is not None or probe_device("cpu").isa not in FAST_PATHS:
        return {}
    narrow = (torch.float16, torch.bfloat16)
    return {name: tensor.dtype for name, tensor in checkpoint.tensors.items() if tensor.dtype in narrow}


SIDES = (
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
)
EXPERT_COUNTS = ("num_experts", "n_routed_experts", "num_local_experts")
MOST_PACKED = 32  # 1-bit codes in int32 words: no stored element stands for more


def _check_sizes(config: ModelConfig, checkpoint: Checkpoint) -> None:
    """Compare the config's sizes with the headers, before anything is built from them.

    CheckpointError for sizes that the checkpoint's tensors cannot have.
    """
    if find_definition(config.raw) is not None:
        config.check_heads()
    most_layers = len(checkpoint.tensors)
    longest = MOST_PACKED * max((max(t.shape, default=1) for t in checkpoint.tensors.values()), default=1)
    sizes = {name: config.size(name) for name in SIDES if config.raw.get(name) is not None}
    for name in EXPERT_COUNTS:
        # 0 stands for a model whose layers are all dense.
        if config.raw.get(name) is not None and repr(config.raw[name]) != "0":
            sizes[name] = config.size(name)
    sizes["num_attention_heads x head_dim"] = config.size("num_attention_heads") * config.head_dim
    limits = {
        "num_hidden_layers": (
            config.size("num_hidden_layers"),
            most_layers,
            "layers than the checkpoint has tensors",
        )
    }
    limits |= {
        name: (size, longest, "than the longest side of any tensor can hold") for name, size in sizes.items()
    }
    for name, (found, most, what) in limits.items():
        if found > most:
            raise CheckpointError(
                f"{checkpoint.config_file.name} claims more {what}",
                code="config-value",
                file=str(checkpoint.config_file),
                tensor=name,
                expected=f"at most {most}",
                found=str(found),
            )
