"""Our methods in models of transformers': `from_pretrained(path, quantization_config=PymllmConfig())`.

    from pymllm.hosts.transformers import PymllmConfig
    model = AutoModelForCausalLM.from_pretrained("org/name-AWQ", quantization_config=PymllmConfig())
    model = AutoModelForCausalLM.from_pretrained("org/name", quantization_config=PymllmConfig({"**.mlp.**": "int4"}))

To import this module registers the quantiser "pymllm" with transformers; `import pymllm` alone does not. transformers
builds the model; every tensor of the checkpoint is then placed, read and packed by our loader, with its accounting.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, modeling_utils
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from pymllm.errors import ConfigError, nearest
from pymllm.hosts.hosted_model import HostedModel
from pymllm.kernels.hardware import probe_device
from pymllm.loading.load import load_prepared
from pymllm.loading.prepare import Prepared, prepare
from pymllm.models.generic.layers import replace_module
from pymllm.quantization.rules import RuleSource, read_rules

NAME = "pymllm"


class PymllmConfig(QuantizationConfigMixin):
    """The settings with which `from_pretrained` loads a checkpoint by our methods.

    quant: rules over the checkpoint's own format, as for `load_model`; None: as stored.
    compute: "auto", "exact" or "checkpoint", as for `load_model`.
    kernels: the kernel of an operation by name, {"linear": "reference"} say; None: the best that can.
    After loading, `checkpoint` holds the checkpoint's own settings, and `methods` how many layers each method has.
    """

    def __init__(
        self,
        quant: RuleSource = None,
        compute: str = "auto",
        kernels: Mapping[str, str] | None = None,
        **loaded: Any,
    ) -> None:
        self.quant_method = NAME  # type: ignore[assignment]
        self.quant = [str(rule) for rule in read_rules(quant)]
        self.compute, self.kernels = compute, dict(kernels or {})
        self.checkpoint: dict[str, Any] | None = loaded.pop("checkpoint", None)
        self.methods: dict[str, int] = loaded.pop("methods", {})
        loaded.pop("quant_method", None)
        for name in loaded:
            raise ConfigError(
                f"PymllmConfig has no setting {name!r}",
                code="config-value",
                tensor=name,
                expected="quant, compute or kernels",
                fix=nearest(name, ("quant", "compute", "kernels")),
            )


class PymllmQuantizer(HfQuantizer):
    """The two ends of transformers' loading: our layers go in before it, and are filled and packed after it."""

    quantization_config: PymllmConfig

    def __init__(self, quantization_config: PymllmConfig, **options: Any) -> None:
        super().__init__(quantization_config, **options)  # type: ignore[no-untyped-call]
        self.pre_quantized = True  # nothing is quantised by transformers as it loads
        self._device = torch.device("cpu")
        self._prepared: Prepared | None = None
        self._aside: list[tuple[str, nn.Module]] = []

    def validate_environment(self, *args: Any, device_map: Any = None, **options: Any) -> None:
        """Refuse to divide the model over several devices."""
        places = set(device_map.values()) if isinstance(device_map, Mapping) else {device_map}
        if len(places) > 1 or places & {"disk", "meta"}:
            raise ConfigError(
                "a model whose weights our kernels run has one device",
                code="device",
                tensor="device_map",
                expected='"cpu", "cuda" or "cuda:N"',
                found=str(device_map),
                fix="For several GPUs: pymllm.LLM(path, tensor_parallel_size=N).",
            )

    def update_device_map(self, device_map: Any) -> dict[str, Any]:
        """Return the one device that is asked for; without a choice, the GPU that "cuda" means, or the CPU."""
        place = next(iter(device_map.values())) if isinstance(device_map, Mapping) else device_map
        if isinstance(place, str) and place in ("auto", "balanced", "balanced_low_0", "sequential"):
            place = probe_device("auto").torch_device
        self._device = torch.device("cpu" if place is None else place)
        if self._device == torch.device("cuda"):
            self._device = probe_device("cuda").torch_device
        return {"": self._device}

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Any = None, **options: Any
    ) -> Any:
        config = self.quantization_config
        with _as_outside():
            self._prepared = prepare(
                _folder_of(checkpoint_files),
                config.quant or None,
                device=str(self._device),
                dtype=model.config.dtype,
                compute=config.compute,
                kernels=config.kernels,
                definition="transformers",
                strategy="autoregressive",
                build=lambda read, rules: HostedModel(read, model, rules),  # type: ignore[arg-type]
            )
        hosted: Any = self._prepared.model
        # transformers' loader finds modules without parameters where ours will be, reads what is plain, and leaves the
        # rest; what is missing, left over or misshapen is an error of `prepare` already.
        self._aside = list(hosted.put_aside())
        model.all_tied_weights_keys = {}
        self._ignored = model._keys_to_ignore_on_load_unexpected
        model._keys_to_ignore_on_load_unexpected = {""}  # a pattern of every name
        for module in model.modules():
            if not any(part._non_persistent_buffers_set for part in module.modules()):
                module._is_hf_initialized = True
        return model

    def _process_model_after_weight_loading(self, model: Any, **options: Any) -> Any:
        prepared = self._prepared
        assert prepared is not None
        hosted: Any = prepared.model
        model._keys_to_ignore_on_load_unexpected = self._ignored
        for name, layer in self._aside:
            replace_module(model, name, layer)
        report: Any = load_prepared(prepared, progress=False).load_report
        hosted.restore_buffers()
        self._prepared, self._aside = None, []
        config, stored = self.quantization_config, prepared.checkpoint.config.get("quantization_config")
        config.checkpoint = None if stored is None else dict(stored)
        config.methods = dict(report.methods)
        model.load_report = report
        model._apply = functools.partial(_apply_in_place, model)
        return model

    def is_serializable(self) -> bool:
        """Refuse to save: the layers are packed for this machine's kernels."""
        raise ConfigError(
            "a model with packed weights is not saved from transformers",
            code="not-writable",
            fix="Write another checkpoint from the one that was loaded: pymllm quantize PATH OUT --quant ...",
        )

    @property
    def is_trainable(self) -> bool:
        return False


@contextlib.contextmanager
def _as_outside() -> Iterator[None]:
    """Leave the default device (meta) and dtype under which transformers builds a model: ours do not go by them."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


def _folder_of(checkpoint_files: Any) -> Path:
    """Return the folder of the checkpoint's files.  ConfigError where they are not safetensors files of one folder."""
    files = [Path(file) for file in checkpoint_files or ()]
    folders = {file.parent for file in files}
    if len(folders) != 1 or any(file.suffix != ".safetensors" for file in files):
        raise ConfigError(
            "the checkpoint is read by our loader, from its files",
            code="checkpoint-files",
            expected="one folder of config.json and safetensors files",
            found=", ".join(sorted({file.name for file in files})[:4]) or "no files",
            fix="A .gguf file is loaded by pymllm.LLM.",
        )
    return folders.pop()


def _apply_in_place(model: Any, change: Callable[[torch.Tensor], torch.Tensor], *args: Any) -> Any:
    """Apply a change to the model's tensors, as torch's `to` and its kin do, if it leaves packed weights as they are.

    ConfigError for another device or dtype.
    """
    before = next(model.parameters()).data[:0]
    after = change(before)
    if (after.device, after.dtype) != (before.device, before.dtype):
        raise ConfigError(
            "packed weights stay on the device and in the dtype for which their kernels were chosen",
            code="device",
            expected=f"{before.device}, {before.dtype}",
            found=f"{after.device}, {after.dtype}",
            fix="Load the model there: from_pretrained(..., device_map=..., dtype=...).",
        )
    return PreTrainedModel._apply(model, change, *args)


def _read_by_us(get_hf_quantizer: Callable[..., Any]) -> Callable[..., Any]:
    """Have transformers leave a checkpoint's own settings to a PymllmConfig: it takes no second config beside them."""

    @functools.wraps(get_hf_quantizer)
    def get(config: Any, quantization_config: Any, *args: Any, **options: Any) -> Any:
        if isinstance(quantization_config, Mapping) and quantization_config.get("quant_method") == NAME:
            quantization_config = PymllmConfig(**quantization_config)
        if isinstance(quantization_config, PymllmConfig):
            if options.get("gguf_file") is not None:
                _folder_of([options["gguf_file"]])
            for one in (config, config.get_text_config(decoder=True)):
                if getattr(one, "quantization_config", None) is not None:
                    one.quantization_config = None
        return get_hf_quantizer(config, quantization_config, *args, **options)

    return get


def register() -> None:
    """Make the quantiser "pymllm" known to transformers.  A second call does nothing."""
    if NAME in AUTO_QUANTIZER_MAPPING:
        return
    register_quantization_config(NAME)(PymllmConfig)
    register_quantizer(NAME)(PymllmQuantizer)
    modeling_utils.get_hf_quantizer = _read_by_us(modeling_utils.get_hf_quantizer)


register()
