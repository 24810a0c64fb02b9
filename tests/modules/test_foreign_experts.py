"""What modules of transformers say of their experts, by their shapes and a proof: layouts, activations, calls."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts
from transformers.models.minimax_m2.modeling_minimax_m2 import MiniMaxM2Experts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from pymllm.modules.foreign_experts import compute, read_experts

# E 6 experts, H 32, I 24: what each config calls them
ROUTED = {"hidden_size": 32, "intermediate_size": 24}
CASES = {
    "mixtral": (MixtralExperts, transformers.MixtralConfig(**ROUTED, num_local_experts=6), "silu", set()),
    "minimax_m2": (
        MiniMaxM2Experts,
        transformers.MiniMaxM2Config(**ROUTED, num_local_experts=6),
        "silu",
        set(),
    ),
    "gelu": (
        MixtralExperts,
        transformers.MixtralConfig(**ROUTED, num_local_experts=6, hidden_act="gelu_pytorch_tanh"),
        "gelu_tanh",
        set(),
    ),
    "relu": (
        MixtralExperts,
        transformers.MixtralConfig(**ROUTED, num_local_experts=6, hidden_act="relu"),
        "other",
        set(),
    ),
    "gpt_oss": (
        GptOssExperts,
        transformers.GptOssConfig(**ROUTED, num_local_experts=6),
        "swiglu",
        {"transposed", "interleaved", "bias"},
    ),
    "llama4": (
        Llama4TextExperts,
        transformers.Llama4TextConfig(**ROUTED, num_local_experts=6),
        "silu",
        {"transposed", "sorted"},
    ),
    "nemotron_h": (
        NemotronHExperts,
        transformers.NemotronHConfig(hidden_size=32, moe_intermediate_size=24, n_routed_experts=6),
        "other",
        {"ungated"},
    ),
    "longcat_flash": (
        LongcatFlashExperts,
        transformers.LongcatFlashConfig(
            hidden_size=32, expert_ffn_hidden_size=24, n_routed_experts=6, zero_expert_num=2
        ),
        "silu",
        {"identities"},
    ),
}


def made(case: str, seed: int = 3) -> nn.Module:
    kind, config = CASES[case][:2]
    config._experts_implementation = "eager"
    module = kind(config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module.eval()


@pytest.mark.parametrize("case", CASES)
def test_the_layout_is_read_and_computes_what_the_module_does(case):
    module, (_, _, activation, marks) = made(case), CASES[case]
    facts = read_experts(module)
    assert not isinstance(facts, str), facts
    assert (facts.num_experts, facts.hidden_size, facts.intermediate_size) == (6, 32, 24)
    assert facts.activation.kind == activation
    found = {name for name in ("transposed", "interleaved", "bias") if getattr(facts, name)}
    found |= {"ungated"} - ({"ungated"} if facts.gated else set())
    found |= {facts.calls} - {"routed"} | ({"identities"} if facts.identities else set())
    assert found == marks
    x = torch.randn(12, 32)
    if facts.calls == "sorted":
        ids, weights = torch.arange(6).repeat_interleave(2).unsqueeze(1), torch.ones(12, 1)
        expected = module(x)
    else:
        ids = torch.stack([torch.randperm(6 + facts.identities)[:3] for _ in range(12)])
        weights = torch.rand(12, 3)
        expected = module(x, ids, weights)
    torch.testing.assert_close(compute(facts, dict(module.named_parameters()), x, ids, weights), expected)


def test_a_module_without_data_says_the_same():
    module = made("gpt_oss")
    facts = read_experts(module)
    assert read_experts(copy.deepcopy(module).to("meta")) == facts


def test_equal_sizes_do_not_confuse_the_proof():
    config = transformers.MixtralConfig(hidden_size=16, intermediate_size=8, num_local_experts=8)
    assert not isinstance(read_experts(MixtralExperts(config)), str)
    config = transformers.AriaTextConfig(hidden_size=32, intermediate_size=32, moe_num_experts=32)
    facts = read_experts(AriaExperts(config))
    assert not isinstance(facts, str) and facts.transposed


class Dropped(MixtralExperts):
    """Experts whose forward is not the one that their shapes suggest."""

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return super().forward(hidden_states, top_k_index, top_k_weights.square())


class Grown(MixtralExperts):
    def __init__(self, config):
        super().__init__(config)
        self.scale = nn.Parameter(torch.ones(6))


class Eager(MixtralExperts):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        raise ZeroDivisionError("not today")


class Normed(MixtralExperts):
    def __init__(self, config):
        super().__init__(config)
        self.has_post_expert_norm = True


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Dropped, "something else"),
        (Grown, "scale"),
        (Eager, "ZeroDivisionError: not today"),
        (Normed, "normalises"),
    ],
)
def test_what_is_not_known_experts_has_a_reason(kind, reason):
    said = read_experts(kind(CASES["mixtral"][1]))
    assert isinstance(said, str) and reason in said


def test_a_clamp_of_its_own_is_kept_as_a_function():
    config = transformers.DeepseekV4Config(hidden_size=32, moe_intermediate_size=24, n_routed_experts=6)
    facts = read_experts(DeepseekV4Experts(config))
    assert not isinstance(facts, str) and facts.activation.kind == "other"
    gate_up = torch.full((1, 48), 50.0)
    limit = float(config.swiglu_limit)
    torch.testing.assert_close(facts.activation(gate_up), F.silu(torch.full((1, 24), limit)) * limit)


def test_reading_leaves_the_module_and_the_random_state_as_they_were():
    module = made("mixtral")
    before, state = module.state_dict(), torch.get_rng_state()
    names = dict(vars(module))
    read_experts(module)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(vars(module)[name] is value for name, value in names.items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert module.config._experts_implementation == "eager"
