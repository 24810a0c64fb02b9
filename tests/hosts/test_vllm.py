"""vLLM's own linear layers and loader with our methods: `--quantization pymllm`.  Runs where vllm is installed."""

# O out_features, I in_features

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("vllm", reason="vllm is not installed: its layers are tested where it is")

from vllm.config import DeviceConfig, LoadConfig, ModelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.model_executor.custom_op import CustomOp
from vllm.model_executor.layers import linear as layers
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models import llama
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper
from vllm.plugins import load_plugins_by_group

import pymllm
from pymllm.errors import CheckpointError, ConfigError, RuleError
from pymllm.hosts.vllm import PymllmConfig, register

from ..checkpoints import AWQ, FP8, SIZES, TinyCheckpoint, load_tensors, relative_error, write_checkpoint
from ..moe_checkpoints import write_moe
from ..quantized import GPTQ, WRITERS, pack

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
# As vLLM's LlamaForCausalLM names the parts of what it fuses.
STACKED = WeightsMapper(
    orig_to_new_stacked={
        ".q_proj": (".qkv_proj", "q"),
        ".k_proj": (".qkv_proj", "k"),
        ".v_proj": (".qkv_proj", "v"),
        ".gate_proj": (".gate_up_proj", 0),
        ".up_proj": (".gate_up_proj", 1),
    }
)
EXACT = 2e-5  # float32 sums of up to 256 products, next to float64


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Any:
    meeting = f"file://{tmp_path_factory.mktemp('ranks') / 'store'}"
    with set_current_vllm_config(VllmConfig(device_config=DeviceConfig("cpu"))):
        init_distributed_environment(1, 0, meeting, 0, "gloo")
        initialize_model_parallel(1, 1)
        yield


class Layers(nn.Module):
    """The linear layers of the first block of a tiny Llama, as vLLM's own classes, under their names in its model."""

    def __init__(self, config: PymllmConfig, heads: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        config.packed_modules_mapping = FUSED
        self.quant_config = config
        hidden, inner, head = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["head_dim"]
        queries, keys = SIZES["num_attention_heads"], SIZES["num_key_value_heads"]
        options: dict[str, Any] = {"bias": False, "quant_config": config, "params_dtype": dtype}
        options["return_bias"] = False
        block, attention, mlp = nn.Module(), nn.Module(), nn.Module()
        place = "model.layers.0"
        attention.qkv_proj = layers.QKVParallelLinear(
            hidden, head, queries, keys, prefix=f"{place}.self_attn.qkv_proj", **options
        )
        attention.o_proj = layers.RowParallelLinear(
            queries * head, hidden, prefix=f"{place}.self_attn.o_proj", **options
        )
        mlp.gate_up_proj = layers.MergedColumnParallelLinear(
            hidden, [inner, inner], prefix=f"{place}.mlp.gate_up_proj", **options
        )
        mlp.down_proj = layers.RowParallelLinear(inner, hidden, prefix=f"{place}.mlp.down_proj", **options)
        block.self_attn, block.mlp = attention, mlp
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([block])
        if heads:
            table = SIZES["vocab_size"], hidden
            names = {"params_dtype": dtype, "quant_config": config}
            self.model.embed_tokens = VocabParallelEmbedding(*table, prefix="model.embed_tokens", **names)
            self.lm_head = ParallelLMHead(*table, prefix="lm_head", **names)

    @property
    def linears(self) -> dict[str, nn.Module]:
        block = self.model.layers[0]
        return {
            "self_attn.qkv_proj": block.self_attn.qkv_proj,
            "self_attn.o_proj": block.self_attn.o_proj,
            "mlp.gate_up_proj": block.mlp.gate_up_proj,
            "mlp.down_proj": block.mlp.down_proj,
        }

    def load(self, folder: Path, heads: bool = False) -> Layers:
        """Load by vLLM's loader, and pack as vLLM does after loading."""
        wanted = ("model.layers.0.self_attn.", "model.layers.0.mlp.")
        wanted = (*wanted, "model.embed_tokens.", "lm_head.") if heads else wanted
        tensors = {name: t for name, t in load_tensors(folder).items() if name.startswith(wanted)}
        tensors = {name: t for name, t in tensors.items() if "norm" not in name}
        loaded = AutoWeightsLoader(self).load_weights(tensors.items(), mapper=STACKED)
        assert loaded == {name for name, _ in self.named_parameters()}
        for module in self.modules():
            method = getattr(module, "quant_method", None)
            if isinstance(method, QuantizeMethodBase):
                method.process_weights_after_loading(module)
        return self


def config_of(folder: Path, **settings: Any) -> PymllmConfig:
    """The config as vLLM makes it, where a user gave rules or a compute mode by hf_overrides."""
    config = PymllmConfig.from_config({"quant_method": "pymllm", **settings})
    config.maybe_update_config(str(folder))
    return config


def meant(checkpoint: TinyCheckpoint, name: str) -> Tensor:
    """The weight [O, I] float64 that the writer's codes stand for, fused as vLLM fuses it."""
    weights, (parent, last) = checkpoint.model.state_dict(), name.rsplit(".", 1)
    names = [f"model.layers.0.{parent}.{part}.weight" for part in FUSED.get(last, [last])]
    return torch.cat([weights[one] for one in names]).double()


def inputs(features: int, rows: int = 5) -> Tensor:
    return torch.randn(rows, features, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("fmt", sorted(WRITERS))
def test_layers_of_vllm_compute_what_a_checkpoint_in_any_format_means(fmt: str, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "model", "llama", WRITERS[fmt])
    hosted = Layers(config_of(checkpoint.folder, compute="exact")).load(checkpoint.folder)
    for name, layer in hosted.linears.items():
        assert type(layer.quant_method).__name__ == "HostedLinearMethod"
        assert not list(layer.named_parameters()), "the stored tensors are freed"
        weight = meant(checkpoint, name)
        for rows in (0, 1, 5):
            x = inputs(weight.shape[1], rows)
            y = layer(x)
            assert y.shape == (rows, weight.shape[0])
            if rows:
                assert relative_error(y.double(), x.double() @ weight.t()) < EXACT


def test_a_checkpoints_own_config_is_read_and_bf16_is_run(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "model", "llama", WRITERS["awq"])
    config = PymllmConfig.from_config(WRITERS["awq"].config(()))
    hosted = Layers(config, dtype=torch.bfloat16).load(checkpoint.folder)
    weight = meant(checkpoint, "mlp.down_proj")
    x = inputs(weight.shape[1]).bfloat16()
    y = hosted.linears["mlp.down_proj"](x)
    assert y.dtype is torch.bfloat16
    assert relative_error(y.double(), x.double() @ weight.t()) < 2e-2  # 8 bits of mantissa


def test_rules_quantise_a_plain_checkpoint_and_parts_may_differ(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "model", "llama", "none")
    rules = {
        "**.q_proj": "int8",
        "**.up_proj": "int4:group_size=32",
        "**.gate_proj": "fp8",
        "lm_head": "int8",
    }
    config = config_of(checkpoint.folder, quant=rules, compute="exact")
    hosted = Layers(config, heads=True).load(checkpoint.folder, heads=True)
    found = {
        name: [method.describe() for method in layer.quant_method.methods]
        for name, layer in hosted.linears.items()
        if hasattr(layer.quant_method, "methods")
    }
    assert [m.split()[0] for m in found["self_attn.qkv_proj"]] == ["int8", "none", "none"]
    assert [m.split()[0] for m in found["mlp.gate_up_proj"]] == ["fp8", "int4"]
    assert "mlp.down_proj" not in found, "what no rule names is vLLM's own"
    for name, limit in (("self_attn.qkv_proj", 1e-2), ("mlp.gate_up_proj", 0.12), ("mlp.down_proj", EXACT)):
        weight = meant(checkpoint, name)
        x = inputs(weight.shape[1])
        error = relative_error(hosted.linears[name](x).double(), x.double() @ weight.t())
        assert error < limit and (name == "mlp.down_proj" or error > EXACT), name
    # vLLM pads the vocabulary; the rows that the checkpoint lacks are zeros
    head = checkpoint.model.state_dict()["lm_head.weight"].double()
    x = inputs(SIZES["hidden_size"])
    y = hosted.lm_head.quant_method.apply(hosted.lm_head, x)
    assert relative_error(y[:, : len(head)].double(), x.double() @ head.t()) < 1e-2
    assert y.shape[1] > len(head) and not y[:, len(head) :].any()


def test_a_quantised_embedding_is_looked_up(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "model", "llama", "none")
    config = config_of(checkpoint.folder, quant={"model.embed_tokens": "int8"})
    hosted = Layers(config, heads=True).load(checkpoint.folder, heads=True)
    ids = torch.tensor([3, 96, 0])
    table = checkpoint.model.state_dict()["model.embed_tokens.weight"]
    error = relative_error(hosted.model.embed_tokens(ids), table[ids])
    assert EXACT < error < 1e-2


@pytest.mark.parametrize("fmt", ["awq", "fp8-block", "compressed-int8"])
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_together_compute_what_one_does(
    fmt: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = FP8((32, 32)) if fmt == "fp8-block" else WRITERS[fmt] if fmt != "awq" else AWQ(32)
    checkpoint = write_checkpoint(tmp_path / "model", "llama", writer)
    ranks = []
    for rank in range(size):
        monkeypatch.setattr(layers, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
        monkeypatch.setattr(layers, "get_tensor_model_parallel_world_size", lambda: size)
        ranks.append(Layers(config_of(checkpoint.folder, compute="exact")).load(checkpoint.folder).linears)

    def own(name: str, rank: int, x: Tensor) -> Tensor:
        layer = ranks[rank][name]
        return layer.quant_method.apply(layer, x)

    heads, keys, head = SIZES["num_attention_heads"], SIZES["num_key_value_heads"], SIZES["head_dim"]
    x = inputs(SIZES["hidden_size"])
    q, k, v = (x.double() @ meant(checkpoint, f"self_attn.{part}").t() for part in FUSED["qkv_proj"])
    for rank in range(size):
        first = rank * keys // size  # with more ranks than key heads, several hold the same one
        mine = max(keys // size, 1)
        expected = [
            q.unflatten(1, (heads, head))[:, rank * heads // size : (rank + 1) * heads // size],
            *(one.unflatten(1, (keys, head))[:, first : first + mine] for one in (k, v)),
        ]
        expected_rows = torch.cat([one.flatten(1) for one in expected], dim=1)
        assert relative_error(own("self_attn.qkv_proj", rank, x).double(), expected_rows) < EXACT
    gate, up = (x.double() @ meant(checkpoint, f"mlp.{part}").t() for part in FUSED["gate_up_proj"])
    for rank in range(size):
        expected_rows = torch.cat([gate.chunk(size, 1)[rank], up.chunk(size, 1)[rank]], dim=1)
        assert relative_error(own("mlp.gate_up_proj", rank, x).double(), expected_rows) < EXACT
    x = inputs(SIZES["intermediate_size"])
    total = sum(own("mlp.down_proj", rank, part) for rank, part in enumerate(x.chunk(size, 1)))
    assert relative_error(total.double(), x.double() @ meant(checkpoint, "mlp.down_proj").t()) < EXACT


def test_a_tensor_that_is_fused_in_the_file_is_cut_into_its_parts(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "model", "phi3", WRITERS["awq"])
    hosted = Layers(config_of(checkpoint.folder, compute="exact")).load(checkpoint.folder)
    for name, layer in hosted.linears.items():
        weight = checkpoint.model.state_dict()[f"model.layers.0.{name}.weight"].double()
        x = inputs(weight.shape[1])
        assert relative_error(layer(x).double(), x.double() @ weight.t()) < EXACT


@pytest.mark.parametrize(("out", "features"), [(7, 40), (1, 8), (33, 129)])
@pytest.mark.parametrize("method", ["int8", "fp8", "int4:group_size=-1"])
def test_odd_shapes_and_a_bias(method: str, out: int, features: int, tmp_path: Path) -> None:
    config = PymllmConfig.from_config({"quant_method": "pymllm", "quant": {"**": method}, "compute": "exact"})
    layer = layers.ReplicatedLinear(
        features,
        out,
        bias=True,
        quant_config=config,
        prefix="proj",
        params_dtype=torch.float32,
        return_bias=False,
    )
    weight = torch.randn(out, features, generator=torch.Generator().manual_seed(1))
    bias = torch.randn(out, generator=torch.Generator().manual_seed(2))
    layer.weight.weight_loader(layer.weight, weight)
    layer.bias.weight_loader(layer.bias, bias)
    layer.quant_method.process_weights_after_loading(layer)
    held = vars(layer)["held_weights"][0].bound.canonical().dequantize(torch.float64)
    x = inputs(features, 12)[::2]  # no rows side by side
    assert relative_error(layer(x).double(), x.double() @ held.t() + bias.double()) < EXACT
    assert relative_error(held.float(), weight) < 0.15
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))


class ActOrder(GPTQ):
    """GPTQ whose groups are not of neighbours: `g_idx` has the group of each input."""

    def config(self, ignored: tuple[str, ...]) -> dict[str, Any]:
        return super().config(ignored) | {"desc_act": True}

    def encode(self, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(len(weight)))
        back = order.argsort()
        stored, means = super().encode(weight[:, order])
        words = stored["qweight"].t().long()
        codes = (words[..., None] >> (4 * torch.arange(8)) & 15).flatten(1)
        stored["qweight"] = pack(codes[:, back]).t().contiguous()
        stored["g_idx"] = (torch.arange(len(order)) // self.group_size)[back].to(torch.int32)
        return stored, means[:, back]


def test_the_order_of_gptqs_inputs_is_read_and_each_part_has_its_own(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "model", "llama", ActOrder())
    hosted = Layers(config_of(checkpoint.folder, compute="exact")).load(checkpoint.folder)
    for name, layer in hosted.linears.items():
        weight = meant(checkpoint, name)
        x = inputs(weight.shape[1])
        assert relative_error(layer(x).double(), x.double() @ weight.t()) < EXACT


def unbuilt(kind: Any) -> Any:
    """A module of vLLM's as configs see its class, without what its making needs."""
    made = kind.__new__(kind)
    nn.Module.__init__(made)
    return made


def test_experts_and_attention_stay_vllms_or_are_refused(tmp_path: Path) -> None:
    place, experts = "model.layers.0.mlp.experts", unbuilt(RoutedExperts)
    quantised = write_moe(tmp_path / "fp8", "qwen3_moe", WRITERS["fp8-tensor"])
    with pytest.raises(ConfigError, match="experts are not run inside vLLM"):
        config_of(quantised.folder).get_quant_method(experts, place)
    plain = write_moe(tmp_path / "plain", "qwen3_moe", "none")
    assert config_of(plain.folder).get_quant_method(experts, place) is None
    with pytest.raises(ConfigError, match=r"experts\.0\.down_proj"):
        config_of(plain.folder, quant={"**.experts.**": "int4"}).get_quant_method(experts, place)
    left = config_of(quantised.folder, quant={"**.experts.**": "none"})
    with pytest.raises(ConfigError, match="experts are not run"):
        left.get_quant_method(experts, place)
    attention = unbuilt(Attention)
    assert config_of(plain.folder).get_quant_method(attention, "model.layers.0.self_attn.attn") is None


def test_what_cannot_be_hosted_is_one_error(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "model", "llama", WRITERS["gptq"])
    with pytest.raises(RuleError, match="matches no module"):
        config_of(checkpoint.folder, quant={"**.mpl.**": "int4"})
    with pytest.raises(ConfigError, match="no setting 'rules'"):
        PymllmConfig.from_config({"quant_method": "pymllm", "rules": {}})
    with pytest.raises(ConfigError, match="unknown compute mode"):
        PymllmConfig.from_config({"quant_method": "pymllm", "compute": "fast"})
    with pytest.raises(ConfigError, match="unknown quantisation method"):
        PymllmConfig.from_config({"quant_method": "nothing-known"})
    hosted = Layers(config_of(checkpoint.folder))
    with pytest.raises(CheckpointError, match="not written"):
        down = hosted.linears["mlp.down_proj"]
        down.quant_method.process_weights_after_loading(down)
    down.qweight.weight_loader(down.qweight, torch.zeros(down.qweight.shape, dtype=torch.int32))
    with pytest.raises(CheckpointError, match="written already"):
        down.qweight.weight_loader(down.qweight, torch.zeros(down.qweight.shape, dtype=torch.int32))
    with pytest.raises(CheckpointError, match="shape does not fit"):
        down.scales.weight_loader(down.scales, torch.zeros(3, 3).half())
    tied = write_checkpoint(tmp_path / "tied", "llama", "none", tie_word_embeddings=True)
    config = PymllmConfig({"quant_method": "pymllm", "quant": {"model.embed_tokens": "int8"}})
    config.maybe_update_config(str(tied.folder), hf_config=tied.model.config)
    with pytest.raises(ConfigError, match="share one table"):
        VocabParallelEmbedding(97, 128, quant_config=config, prefix="model.embed_tokens")


def test_processes_get_the_config_without_open_files(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "model", "llama", WRITERS["bitsandbytes-4"])
    sent = pickle.loads(pickle.dumps(config_of(checkpoint.folder, compute="exact")))
    hosted = Layers(sent).load(checkpoint.folder)
    weight = meant(checkpoint, "mlp.down_proj")
    x = inputs(weight.shape[1])
    assert relative_error(hosted.linears["mlp.down_proj"](x).double(), x.double() @ weight.t()) < EXACT


def test_vllm_finds_the_plugin_by_its_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tomllib

    root = Path(__file__).parents[2]
    points = tomllib.loads((root / "pyproject.toml").read_text())["project"]["entry-points"]
    text = "".join(
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in named.items())
        for group, named in points.items()
    )
    installed = tmp_path / "pymllm_of_this_tree-0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: pymllm-of-this-tree\nVersion: 0\n")
    (installed / "entry_points.txt").write_text(text)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert load_plugins_by_group("vllm.general_plugins")["pymllm"] is register
    register()
    register()
    assert get_quantization_config("pymllm") is PymllmConfig


def test_a_checkpoint_of_another_format_is_taken_only_where_the_user_asks(tmp_path: Path) -> None:
    register()
    checkpoint = write_checkpoint(tmp_path / "model", "llama", WRITERS["awq"])
    settings = WRITERS["awq"].config(())
    assert PymllmConfig.override_quantization_method(settings, "pymllm") == "pymllm"
    assert PymllmConfig.override_quantization_method(settings, None) is None
    assert PymllmConfig.override_quantization_method(settings, "awq") is None
    options = {"model": str(checkpoint.folder), "skip_tokenizer_init": True, "dtype": "bfloat16"}
    asked = ModelConfig(quantization="pymllm", **options)
    assert asked.quantization == "pymllm"
    made = VllmConfig.get_quantization_config(asked, LoadConfig())
    assert isinstance(made, PymllmConfig) and made.headers
    assert ModelConfig(**options).quantization != "pymllm"


class TorchAttention(nn.Module):
    """Attention over one text, in the place of vLLM's, which needs its compiled parts."""

    def __init__(self, heads: int, head_size: int, scale: float, **options: Any) -> None:
        super().__init__()
        self.head_size, self.scale = head_size, scale

    def forward(self, *states: Tensor) -> Tensor:
        q, k, v = (x.unflatten(1, (-1, self.head_size)).transpose(0, 1)[None] for x in states)
        y = nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.scale, enable_gqa=True
        )
        return y[0].transpose(0, 1).flatten(1)


@pytest.mark.parametrize("quant", [{}, {"**.mlp.gate_proj": "fp8", "**.o_proj": "none", "lm_head": "fp8"}])
def test_vllms_llama_with_its_own_loader_gives_our_logits(
    quant: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register()
    monkeypatch.setattr(llama, "Attention", TorchAttention)
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)  # there is no accelerator
    checkpoint = write_checkpoint(tmp_path / "model", "llama", WRITERS["awq"], shards=2)
    settings = {"quant_method": "pymllm", "quant": quant, "compute": "exact"}
    options: dict[str, Any] = {"skip_tokenizer_init": True, "enforce_eager": True, "dtype": "float32"}
    model_config = ModelConfig(
        str(checkpoint.folder),
        quantization="pymllm",
        hf_overrides={"quantization_config": settings},
        **options,
    )
    load_config = LoadConfig()
    config = VllmConfig(model_config=model_config, load_config=load_config, device_config=DeviceConfig("cpu"))
    with set_current_vllm_config(config), torch.no_grad():
        model = DefaultModelLoader(load_config).load_model(config, model_config)
        for module in model.modules():
            if isinstance(module, CustomOp):  # no compiled operations either
                module._forward_method = module.forward_native
        hidden = model(checkpoint.ids, torch.arange(len(checkpoint.ids)), None)
        found = model.lm_head.quant_method.apply(model.lm_head, hidden)[:, : SIZES["vocab_size"]]
    ours = pymllm.LLM(checkpoint.folder, quant=quant, dtype="float32", progress=False)
    assert relative_error(found, ours.logits(checkpoint.ids)) < EXACT
    assert (relative_error(found, checkpoint.logits()) < EXACT) is not bool(quant)
