"""Config readers, routers and the metadata that they hand on."""

# T tokens, E experts, K experts a token

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from pymllm.config import ModelConfig
from pymllm.errors import ConfigError
from pymllm.moe import (
    DispatcherStage,
    ExpertExecutionMetadata,
    GroupLimitedTopKRouter,
    NaiveTopKRouter,
    RouterMetadata,
    TopKOutput,
    build_mlp_or_moe,
    build_moe_block,
    build_topk_router,
    get_decoder_sparse_step,
    get_first_k_dense_replace,
    get_mlp_only_layers,
    get_moe_intermediate_size,
    get_norm_topk_prob,
    get_num_experts,
    get_num_experts_per_tok,
    is_moe_layer,
)


def config(**settings):
    return SimpleNamespace(**settings)


@pytest.mark.parametrize("wrap", (config, lambda **s: ModelConfig(s)), ids=("object", "ModelConfig"))
def test_readers_take_the_first_name_that_is_not_null(wrap):
    assert get_num_experts(wrap(num_experts=None, n_routed_experts=8, num_local_experts=4)) == 8
    assert get_num_experts(wrap(num_local_experts=4)) == 4 and get_num_experts(wrap()) == 0
    assert get_num_experts_per_tok(wrap(moe_top_k=3, top_k=5)) == 3 and get_num_experts_per_tok(wrap()) == 2
    assert get_moe_intermediate_size(wrap(expert_intermediate_size=7, intermediate_size=9)) == 7
    assert get_moe_intermediate_size(wrap(moe_intermediate_size=None, intermediate_size=9)) == 9
    with pytest.raises(AttributeError):
        get_moe_intermediate_size(wrap())
    assert get_norm_topk_prob(wrap()) is True and get_norm_topk_prob(wrap(norm_topk_prob=False)) is False
    assert not get_mlp_only_layers(wrap()) and list(get_mlp_only_layers(wrap(mlp_only_layers=[2]))) == [2]
    assert (
        get_first_k_dense_replace(wrap()) is None
        and get_first_k_dense_replace(wrap(first_k_dense_replace=0)) == 0
    )
    assert get_decoder_sparse_step(wrap()) == 1 and get_decoder_sparse_step(wrap(decoder_sparse_step=0)) == 0


@pytest.mark.parametrize(
    "settings, sparse",
    (
        ({}, []),
        ({"num_experts": 4}, [0, 1, 2, 3, 4, 5]),
        ({"num_experts": 4, "mlp_only_layers": [0, 3]}, [1, 2, 4, 5]),
        ({"num_experts": 4, "first_k_dense_replace": 2}, [2, 3, 4, 5]),
        ({"num_experts": 4, "first_k_dense_replace": 2, "mlp_only_layers": [4]}, [2, 3, 5]),
        ({"num_experts": 4, "decoder_sparse_step": 2}, [1, 3, 5]),
        ({"num_experts": 4, "decoder_sparse_step": 0}, []),
        ({"num_experts": 4, "decoder_sparse_step": -1}, []),
    ),
)
def test_which_layers_have_experts(settings, sparse):
    assert [layer for layer in range(6) if is_moe_layer(config(**settings), layer)] == sparse


def test_a_layer_without_experts_is_what_the_dense_factory_makes():
    settings = {"num_experts": 4, "mlp_only_layers": [0], "hidden_size": 8, "intermediate_size": 8}
    dense = torch.nn.Identity()
    assert build_mlp_or_moe(config(**settings), 0, lambda: dense) is dense
    sparse = build_mlp_or_moe(config(**settings), 1, lambda: dense)
    assert sparse.num_experts == 4 and sparse.top_k == 2


def logits(tokens=50, experts=8, seed=0):
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed)) * 2


@pytest.mark.parametrize("scoring", ("softmax", "sigmoid", "topk_softmax"))
@pytest.mark.parametrize("renormalize", (True, False))
@pytest.mark.parametrize("top_k", (1, 2, 8))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_the_best_experts_by_a_formula_in_float64(scoring, renormalize, top_k, dtype):
    given = logits().to(dtype)
    found = NaiveTopKRouter(top_k, renormalize=renormalize, scoring_func=scoring)(given)
    exact = given.double()
    for token in range(given.shape[0]):
        order = sorted(range(8), key=lambda e: -float(exact[token, e]))[:top_k]
        if scoring == "sigmoid":
            scores = 1 / (1 + torch.exp(-exact[token]))
        else:
            scores = torch.exp(exact[token]) / torch.exp(exact[token]).sum()
        weights = scores[order]
        if scoring == "topk_softmax" or (renormalize and top_k > 1):
            if scoring == "topk_softmax":
                weights = torch.exp(exact[token][order])
            weights = weights / weights.sum()
        assert set(found.ids[token].tolist()) == set(order) or dtype is torch.bfloat16  # ties
        ranked = found.weights[token].sort(descending=True).values
        torch.testing.assert_close(ranked, weights.float().sort(descending=True).values)
    assert found.weights.dtype is torch.float32 and found.router_logits is given
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.ids = None


@pytest.mark.parametrize("bias", (None, torch.tensor([0.0, 9, 0, 0, 0, 0, -9, 0])), ids=("none", "bias"))
@pytest.mark.parametrize("renormalize", (True, False))
def test_groups_limit_the_choice_and_a_bias_ranks_without_weighing(bias, renormalize):
    router = build_topk_router(
        "group_limited",
        top_k=3,
        num_experts=8,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        expert_bias_getter=lambda: bias,
        renormalize=renormalize,
    )
    given = logits()
    found = router(given)
    for token, row in enumerate(given.double()):
        scores = 1 / (1 + torch.exp(-row))
        ranked = scores if bias is None else scores + bias.double()
        sums = [float(ranked[2 * g] + ranked[2 * g + 1]) for g in range(4)]  # of the best two: both
        groups = sorted(range(4), key=lambda g: -sums[g])[:2]
        allowed = [e for g in groups for e in (2 * g, 2 * g + 1)]
        chosen = sorted(allowed, key=lambda e: -float(ranked[e]))[:3]
        assert set(found.ids[token].tolist()) == set(chosen)
        weights = scores[found.ids[token]] / (scores[chosen].sum() if renormalize else 1)
        torch.testing.assert_close(found.weights[token], (2.5 * weights).float())
    if bias is not None:
        assert bool((found.ids == 1).any(-1).all()), "a bias of 9 always wins"


def test_an_expert_outside_the_best_groups_is_never_chosen_even_if_all_scores_are_negative():
    bias = torch.full((8,), -5.0)
    router = GroupLimitedTopKRouter(
        2, num_experts=8, n_group=4, topk_group=1, expert_bias_getter=lambda: bias
    )
    ids = router(logits()).ids
    assert bool((ids[:, 0] // 2 == ids[:, 1] // 2).all())


@pytest.mark.parametrize(
    "options, named",
    (
        ({"impl": "grouplimited"}, "Nearest: group_limited"),
        ({"top_k": 0}, "num_experts_per_tok"),
        ({"top_k": 2, "scoring_func": "tanh"}, "scoring_func"),
        (
            {"impl": "group_limited", "top_k": 2, "num_experts": 8, "n_group": 3, "topk_group": 1},
            "n_group",
        ),
        (
            {"impl": "group_limited", "top_k": 2, "num_experts": 8, "n_group": 4, "topk_group": 5},
            "topk_group",
        ),
        (
            {"impl": "group_limited", "top_k": 3, "num_experts": 8, "n_group": 4, "topk_group": 1},
            "num_experts_per_tok",
        ),
    ),
)
def test_settings_that_no_router_can_have(options, named):
    with pytest.raises(ConfigError, match=named):
        build_topk_router(**options)


def test_more_experts_a_token_than_there_are():
    with pytest.raises(ConfigError, match="at most the 8 experts"):
        NaiveTopKRouter(9)(logits())


@pytest.mark.parametrize("experts", (6, 10))
def test_logits_of_other_experts_than_the_groups_were_made_of(experts):
    router = GroupLimitedTopKRouter(2, num_experts=8, n_group=2, topk_group=1)
    with pytest.raises(ConfigError, match=f"expected 8, .*logits of {experts}"):
        router(torch.zeros(3, experts))


def test_an_unknown_block_names_those_there_are():
    with pytest.raises(ConfigError, match="auto or naive or tp or ep"):
        build_moe_block("fast", config(hidden_size=8, intermediate_size=8, num_experts=2))


def test_router_metadata():
    empty = RouterMetadata.empty(8, 2)
    assert empty.topk_ids.shape == (0, 2) and empty.router_logits.shape == (0, 8)
    output = NaiveTopKRouter(2)(logits())
    assert isinstance(output, TopKOutput)
    metadata = RouterMetadata.from_topk_output(output)
    assert metadata.topk_ids is output.ids and metadata.topk_weights is output.weights


def test_a_stage_names_the_call_that_it_awaits():
    DispatcherStage.INITIAL.expect(DispatcherStage.INITIAL)
    with pytest.raises(RuntimeError, match="awaits dispatch_a, so combine_b cannot"):
        DispatcherStage.INITIAL.expect(DispatcherStage.AFTER_COMBINE_A)


@pytest.mark.parametrize(
    "tokens, top_k, experts, block", ((0, 2, 4, 4), (1, 1, 1, 16), (13, 3, 5, 4), (40, 2, 3, 8))
)
def test_slots_sorted_into_blocks_of_one_expert(tokens, top_k, experts, block):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(-1, experts, (tokens, top_k), generator=generator)
    weights = torch.rand(tokens, top_k, generator=generator)
    found = ExpertExecutionMetadata.build(ids, weights, experts, block)
    held = [(t, int(e), float(weights[t, k])) for t in range(tokens) for k, e in enumerate(ids[t]) if e >= 0]
    packed = zip(
        found.packed_token_ids.tolist(),
        found.packed_local_expert_ids.tolist(),
        found.packed_weights.tolist(),
        strict=True,
    )
    assert list(packed) == held and found.num_slots == len(held)
    assert found.num_tokens_post_padded == len(found.sorted_slot_ids) == block * len(found.expert_block_ids)
    seen = []
    for index, expert in enumerate(found.expert_block_ids.tolist()):
        slots = found.sorted_slot_ids[index * block : (index + 1) * block].tolist()
        real = [slot for slot in slots if slot < len(held)]
        assert real and all(held[slot][1] == expert for slot in real)
        assert slots == real + [len(held)] * (block - len(real))
        seen += real
    assert sorted(seen) == list(range(len(held)))
