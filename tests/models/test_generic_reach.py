"""What works for a page works for transformers' classes: ranks, adapters, swaps, rules, written checkpoints."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import pymllm
import pymllm.models
from pymllm.api import load_model, shipped_model
from pymllm.checking.verify import verify
from pymllm.errors import RuleError, ShardingError
from pymllm.loading.prepare import prepare
from pymllm.models.generic.alike import repeated_once
from pymllm.models.generic.layers import is_plain_linear
from pymllm.parallel import simulate
from pymllm.planning.make_plan import make_plan
from pymllm.writing.float_model import FloatModel
from pymllm.writing.layers import steps_of

from ..checkpoints import relative_error
from ..forward import logits_of
from ..generic.zoo import small

IDS = list(range(20, 44))
TOLERANCE = 1e-6  # float32 sums in another order
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 130,
    "pad_token_id": 0,
    "max_position_embeddings": 256,
}
EXPERTS = {
    "moe_intermediate_size": 32,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
}
TYPES = {
    "exaone4": SIZES | {"num_hidden_layers": 4, "sliding_window": 8, "sliding_window_pattern": 4},
    "glm4_moe": SIZES | EXPERTS | {"first_k_dense_replace": 1, "head_dim": 16, "use_qk_norm": True},
    "starcoder2": SIZES | {"use_bias": True},
    "smollm3": SIZES | {"tie_word_embeddings": True},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 130, "n_positions": 256},
    "nemotron_h": SIZES
    | EXPERTS
    | {
        "layers_block_type": ["attention", "moe", "attention"],
        "head_dim": 16,
        "moe_shared_expert_intermediate_size": 32,
    },
}


class Tiny:
    """A model of random weights, in a folder.  model: transformers'."""

    def __init__(self, folder: Path, model_type: str, **settings: object) -> None:
        self.folder = folder
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(model_type, **TYPES[model_type] | settings)
        auto = transformers.AutoModelForCausalLM
        self.model = auto.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
        for parameter in self.model.parameters():
            noise = torch.randn_like(parameter)
            parameter.data = (
                parameter.data + 0.2 * noise if parameter.ndim == 1 else noise * parameter.shape[-1] ** -0.5
            )
        self.model.save_pretrained(folder)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (folder / file).write_bytes((shipped_model() / file).read_bytes())

    def logits(self) -> Tensor:
        with torch.no_grad():
            return self.model(input_ids=torch.tensor([IDS]), use_cache=False).logits[0]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    made: dict[str, Tiny] = {}

    def make(model_type: str) -> Tiny:
        if model_type not in made:
            made[model_type] = Tiny(tmp_path_factory.mktemp(model_type), model_type)
        return made[model_type]

    return make


def load(folder, **options):
    return pymllm.LLM(folder, device="cpu", dtype="float32", **options)


# --- ranks


@pytest.mark.parametrize("whole_experts", (False, True))
@pytest.mark.parametrize("model_type", ("exaone4", "glm4_moe", "starcoder2", "nemotron_h"))
def test_ranks_answer_as_transformers(tiny, model_type, whole_experts):
    """With two key heads, which four ranks share; each rank has its share of heads and of the KV cache."""
    one = tiny(model_type)
    if not one.model.config.base_model_tp_plan:
        pytest.skip(f"transformers {transformers.__version__} does not say how to divide the class")
    with_one = make_plan(prepare(one.folder, device="cpu", dtype="float32"))
    assert with_one.tensor_parallel["legal_sizes"] == [1, 2, 4]

    def work(_):
        model = load_model(one.folder, device="cpu", dtype="float32")
        return logits_of(model, torch.tensor(IDS)), model.load_report.bytes_read

    for size in (2, 4):
        for logits, read in simulate(size, work, expert_parallel=whole_experts):
            assert relative_error(logits, one.logits()) <= TOLERANCE
            assert read < 0.8 * one.folder.joinpath("model.safetensors").stat().st_size


def test_a_class_without_a_plan_is_not_divided_and_says_so(tiny):
    plan = make_plan(prepare(tiny("gpt2").folder))
    assert plan.tensor_parallel["legal_sizes"] == [1]
    assert "GPT2LMHeadModel has no plan" in plan.tensor_parallel["refused_sizes"]["2"]
    with pytest.raises(ShardingError, match="has no plan of tensor parallelism"):
        simulate(2, lambda _: prepare(tiny("gpt2").folder))


def test_a_style_that_is_not_known_is_a_reason(tiny, monkeypatch):
    config = type(tiny("smollm3").model.config)
    styles = config.base_model_tp_plan | {"layers.*.mlp.up_proj": "spiral"}
    monkeypatch.setattr(config, "base_model_tp_plan", styles)
    refused = make_plan(prepare(tiny("smollm3").folder)).tensor_parallel["refused_sizes"]
    assert "mlp.up_proj is to be divided in a way that is not known here, spiral" in refused["2"]


def test_a_plan_that_the_modules_cannot_follow_is_a_reason(tiny, monkeypatch):
    config = type(tiny("smollm3").model.config)
    styles = {name: style for name, style in config.base_model_tp_plan.items() if "o_proj" not in name}
    monkeypatch.setattr(config, "base_model_tp_plan", styles)
    refused = make_plan(prepare(tiny("smollm3").folder)).tensor_parallel["refused_sizes"]
    assert "self_attn.o_proj gets 32 of its 64 features" in refused["2"]


# --- rules


def test_ungated_experts_are_ours(tiny):
    one = tiny("nemotron_h")
    llm = load(one.folder)
    assert relative_error(llm.logits(IDS), one.logits()) <= TOLERANCE
    assert sum(row.kind == "experts" for row in llm.plan.layers) == 2 * EXPERTS["n_routed_experts"]
    assert verify(one.folder, "**.experts.**=int8", device="cpu", dtype="float32").ok


def test_a_rule_that_names_a_plain_router_is_refused_and_a_sweeping_one_is_noted(tiny):
    with pytest.raises(RuleError, match="TopkRouter computes with it itself") as refused:
        prepare(tiny("glm4_moe").folder, "**.mlp.gate=int8")
    assert refused.value.code == "rule-unreached"
    notes = make_plan(prepare(tiny("glm4_moe").folder, "**=int8")).notes
    assert (
        sum(
            "2 weights that **=int8 names stay as they are: model.layers.1.mlp.gate" in note for note in notes
        )
        == 1
    )
    assert not any("stay as they are" in note for note in make_plan(prepare(tiny("glm4_moe").folder)).notes)


@pytest.mark.parametrize("model_type", ("glm4_moe", "smollm3", "gpt2"))
def test_a_swap_is_the_same_as_loading_with_the_rule(tiny, model_type):
    one = tiny(model_type)
    llm = load(one.folder)
    before = llm.logits(IDS)
    swapped = pymllm.swap(llm, "**", "int8")
    assert torch.equal(llm.logits(IDS), load(one.folder, quant="**=int8").logits(IDS))
    assert not torch.equal(llm.logits(IDS), before)
    swapped.undo()
    assert torch.equal(llm.logits(IDS), before)


# --- adapters


@pytest.mark.parametrize("model_type", ("exaone4", "smollm3"))
def test_adapters_answer_as_peft(tiny, tmp_path, model_type):
    one = tiny(model_type)
    base = transformers.AutoModelForCausalLM.from_pretrained(one.folder, dtype=torch.float32).eval()
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    adapted = peft.get_peft_model(base, config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = adapted(input_ids=torch.tensor([IDS]), use_cache=False).logits[0]
    llm = load(one.folder)
    llm.load_adapter("a", tmp_path)
    assert relative_error(expected, one.logits()) > 0.1
    assert relative_error(llm.logits(IDS, adapter="a"), expected) <= 1e-5


# --- written checkpoints


@pytest.mark.parametrize("model_type", ("exaone4", "glm4_moe", "nemotron_h"))
def test_a_written_checkpoint_loads_here_and_in_transformers(tiny, tmp_path, model_type):
    rule = "**.layers.**=int8"
    pymllm.quantize_checkpoint(tiny(model_type).folder, tmp_path / "q", rule, format="compressed-tensors")
    logits = load(tmp_path / "q").logits(IDS)
    assert torch.equal(logits, load(tiny(model_type).folder, quant=rule).logits(IDS))
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32).eval()
    with torch.no_grad():
        assert relative_error(logits, other(input_ids=torch.tensor([IDS]), use_cache=False).logits[0]) <= 1e-5


@pytest.mark.parametrize(
    "rule", ("**.layers.**=int8", "**.layers.1.linear=int8", "**.layers.3.shared_transformer.**=int8")
)
def test_blocks_that_share_weights_are_written_as_the_rules_say(tmp_path, rule):
    """Zamba 2's layers 1 and 3 have one transformer block between them."""
    small("zamba2").model().save_pretrained(tmp_path / "m")
    pymllm.quantize_checkpoint(tmp_path / "m", tmp_path / "q", rule, format="compressed-tensors")
    logits = load(tmp_path / "q").logits(IDS)
    assert torch.equal(logits, load(tmp_path / "m", quant=rule).logits(IDS))


class SpelledOut(nn.Linear):
    """A linear layer as Falcon has it."""

    def forward(self, x):
        return x @ self.weight.T + self.bias


class Halved(nn.Linear):
    def forward(self, x):
        return super().forward(x) / 2


def test_a_linear_layer_with_a_forward_of_its_own_is_ours_if_it_computes_the_same():
    with torch.device("meta"):
        assert is_plain_linear(SpelledOut(8, 6))
        assert not is_plain_linear(Halved(8, 6))


def test_layers_that_no_rule_names_keep_their_transposed_weights(tiny, tmp_path):
    rule = "**.mlp.**=int8"
    pymllm.quantize_checkpoint(tiny("gpt2").folder, tmp_path / "q", rule, format="compressed-tensors")
    logits = load(tmp_path / "q").logits(IDS)
    assert torch.equal(logits, load(tiny("gpt2").folder, quant=rule).logits(IDS))


@pytest.mark.parametrize("model_type", ("exaone4", "glm4_moe", "gpt2", "nemotron_h"))
def test_calibration_runs_a_block_at_a_time_to_what_the_whole_model_gives(tiny, model_type):
    """Two windows side by side: what reaches the head is what transformers computes of each."""
    one = tiny(model_type)
    seen: list[Tensor] = []
    head = one.model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    with torch.no_grad():
        for window in (IDS, IDS[::-1][:9]):
            one.model(input_ids=torch.tensor([window]), use_cache=False)
    hook.remove()
    prepared = prepare(one.folder, device="cpu", dtype="float32")
    floats = FloatModel(prepared, (tuple(IDS), tuple(IDS[::-1][:9])))
    with torch.no_grad():
        for step in steps_of(prepared):
            with floats.materialised(step, {layer.name: layer.read() for layer in step.layers}) as running:
                floats.hidden = running.run()
    assert floats.hidden is not None
    assert relative_error(floats.hidden, torch.cat(seen)) <= 1e-5


def test_gguf_files_are_refused_with_the_reason(tiny, tmp_path):
    with pytest.raises(
        pymllm.errors.ConfigError, match="no word on what GGUF files call the tensors of exaone4"
    ):
        pymllm.quantize_checkpoint(tiny("exaone4").folder, tmp_path / "m.gguf", "**=gguf:type=Q8_0")


# --- what is alike, and what gets a page


class Numbered(nn.Module):
    def __init__(self, index: int, uses: bool) -> None:
        super().__init__()
        self.place, self.uses, self.runs = index, uses, []
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.runs.append(1)
        return self.linear(x) * (self.place + 1 if self.uses else 1)


@pytest.mark.parametrize("uses", (False, True))
def test_modules_that_are_alike_run_once_unless_they_use_their_place(uses):
    layers = nn.ModuleList(Numbered(index, uses) for index in range(4))
    for layer in layers:
        layer.runs = layers[0].runs
    model = nn.Sequential(*layers)
    model.layers = layers
    with repeated_once(model) as repeated, torch.device("meta"):
        model.to("meta")
        x = torch.empty(2, 4)
        for layer in layers:
            x = layer(x)
    assert len(layers[0].runs) == (4 if uses else 1)
    assert repeated == ({} if uses else {f"layers.{index}": "layers.0" for index in (1, 2, 3)})
    assert [layer.place for layer in layers] == [0, 1, 2, 3]


PAGE = """
from pymllm.models import llama
DEFAULTS = {**llama.DEFAULTS, "no_rope_layers": None, "no_rope_layer_interval": None}
class Model(llama.Model):
    @property
    def notes(self):
        return ["a page of its own"]
"""


def test_a_page_that_is_added_takes_its_type_over(tiny, tmp_path, monkeypatch):
    """One file, and nothing else changes."""
    folder = tiny("smollm3").folder
    assert "transformers' SmolLM3ForCausalLM" in make_plan(prepare(folder)).notes[0]
    tmp_path.joinpath("smollm3.py").write_text(PAGE)
    monkeypatch.setattr(pymllm.models, "__path__", [*pymllm.models.__path__, str(tmp_path)])
    prepared = prepare(folder)
    assert type(prepared.model).__module__ == "pymllm.models.smollm3"
    assert make_plan(prepared).notes[0] == "a page of its own"
    assert relative_error(load(folder).logits(IDS), tiny("smollm3").logits()) <= TOLERANCE


def test_a_large_part_that_no_rule_reaches_is_a_note_of_every_plan(tmp_path):
    """DBRX lays all experts of a layer along one axis."""
    sizes = {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 130, "max_seq_len": 64}
    experts = {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32}
    config = transformers.DbrxConfig(
        **sizes, ffn_config=experts, attn_config={"kv_n_heads": 2, "rope_theta": 10000.0}
    )
    transformers.DbrxForCausalLM(config).save_pretrained(tmp_path)
    notes = make_plan(prepare(tmp_path)).notes
    assert any("of the weights stay as they are" in note and "ffn.experts.mlp.w1" in note for note in notes)
