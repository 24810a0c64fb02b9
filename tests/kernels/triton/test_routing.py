"""Routing on the GPU against a formula in float64, and where no formula decides."""

# T tokens, E experts, K experts a token

import pytest
import torch

from pymllm.config import Execution
from pymllm.kernels.aten.routing import TorchRouting
from pymllm.kernels.registry import select
from pymllm.kernels.routing import Routing, RoutingProblem
from pymllm.kernels.triton.routing import TritonRouting
from pymllm.moe import build_topk_router
from pymllm.planning.make_plan import plan
from tests.moe_checkpoints import write_moe

from .gpu import DEVICE, FLOATS, HERE, randn

RULES = {
    "best of all": (60, Routing(top_k=4, renormalize=False)),
    "renormalised": (8, Routing(top_k=3)),
    "one": (5, Routing(top_k=1, scoring="sigmoid", scale=3.0)),
    "one that weighs one": (7, Routing(top_k=1, scoring="sigmoid", single_weighs_one=True)),
    "every one": (6, Routing(top_k=6, scoring="sigmoid")),
    "softmax over the chosen": (33, Routing(top_k=5, scoring="topk_softmax", scale=0.5)),
    "groups by their best two": (
        24,
        Routing(top_k=5, scoring="sigmoid", scale=2.5, groups=6, kept_groups=3, group_best=2),
    ),
    "groups by their best": (15, Routing(top_k=4, renormalize=False, groups=3, kept_groups=2)),
    "groups of one": (8, Routing(top_k=2, scoring="sigmoid", groups=8, kept_groups=2)),
}


def by_formula(routing, row, bias):
    """The experts of one token, best first, and their weights, both by plain Python over float64."""
    exact = row.double()
    if routing.scoring == "sigmoid":
        scores = 1 / (1 + torch.exp(-exact))
    elif routing.scoring == "softmax":
        scores = torch.exp(exact) / torch.exp(exact).sum()
    else:
        scores = exact
    ranked = (scores if bias is None else scores + bias.double()).tolist()
    size = len(ranked) // routing.groups
    of_group = [ranked[g * size : (g + 1) * size] for g in range(routing.groups)]
    worth = [sum(sorted(group)[-routing.group_best :]) for group in of_group]
    kept = sorted(range(routing.groups), key=lambda g: -worth[g])[: routing.kept_groups]
    allowed = [e for e in range(len(ranked)) if e // size in kept]
    chosen = sorted(allowed, key=lambda e: -ranked[e])[: routing.top_k]
    weights = scores[chosen]
    if routing.scoring == "topk_softmax":
        weights = torch.exp(weights) / torch.exp(weights).sum()
    elif routing.renormalize and (routing.top_k > 1 or routing.single_weighs_one):
        weights = weights / weights.sum()
    return chosen, weights * routing.scale


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("biased", (False, True), ids=("", "bias"))
def test_choices_and_weights_equal_float64(rule, biased):
    experts, routing = RULES[rule]
    logits = randn(6, 2 * experts)[:, :experts] * 3  # rows with a stride, no two scores near each other
    bias = randn(experts, seed=1) if biased else None
    weights, ids = TritonRouting().run(routing, logits, bias)
    assert weights.dtype is torch.float32 and ids.dtype is torch.int64
    for token in range(6):
        expected, exact = by_formula(routing, logits[token].cpu(), None if bias is None else bias.cpu())
        assert ids[token].tolist() == expected
        torch.testing.assert_close(weights[token].cpu().double(), exact, rtol=3e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rule", ("renormalised", "groups by their best two"))
def test_equal_scores_go_to_the_lower_expert(rule, dtype):
    experts, routing = RULES[rule]
    logits = randn(4, experts).mul(2).round().to(dtype)  # few values, so many are equal
    _, ids = TritonRouting().run(routing, logits, None)
    for token in range(4):
        assert ids[token].tolist() == by_formula(routing, logits[token].cpu(), None)[0]


@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf"), 3e38, 0.0), ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_no_expert_is_outside_or_chosen_twice_whatever_the_logits(rule, value):
    experts, routing = RULES[rule]
    logits = torch.full((2, experts), value, device=HERE)
    logits[1, : experts // 2] = 0.0
    _, ids = TritonRouting().run(routing, logits, None)
    for row in ids.tolist():
        assert len(set(row)) == routing.top_k and min(row) >= 0 and max(row) < experts


def test_no_tokens_and_tensors_without_data():
    routing = Routing(top_k=2)
    for logits in (torch.empty(0, 8, device=HERE), torch.empty(3, 8, device="meta")):
        weights, ids = TritonRouting().run(routing, logits, None)
        assert weights.shape == ids.shape == (logits.shape[0], 2) and weights.device == logits.device


def test_torch_compile_keeps_the_kernel_as_one_operator():
    logits, bias = randn(4, 24), randn(24, seed=1)
    routing = RULES["groups by their best two"][1]
    compiled = torch.compile(TritonRouting().run, backend="aot_eager", fullgraph=True)
    for found, expected in zip(
        compiled(routing, logits, bias), TritonRouting().run(routing, logits, bias), strict=True
    ):
        assert torch.equal(found, expected)


def test_what_it_cannot_run_goes_to_torch():
    def chosen(experts=8, dtype=torch.bfloat16, device=DEVICE, **rule):
        problem = RoutingProblem(Routing(top_k=2, **rule), experts, dtype, device)
        selection = select("routing", problem)
        return selection.kernel.name, [refusal.why for refusal in selection.refused]

    assert chosen() == ("triton_routing", [])
    assert chosen(2049) == ("torch", ["takes up to 2048 experts, not 2049 in 1 groups"])
    assert chosen(33 * 33, groups=33) == ("torch", ["takes up to 2048 experts, not 1089 in 33 groups"])
    assert chosen(dtype=torch.float64)[0] == "torch"


def test_a_router_that_a_model_has_taken_runs_the_chosen_kernel():
    router = build_topk_router(
        "group_limited", top_k=3, num_experts=24, n_group=6, topk_group=2, routed_scaling_factor=1.5
    )
    logits = randn(5, 24)
    before = router(logits)
    assert router.selection is None, "on its own it takes tensors of any kind"
    with Execution(device="cuda" if HERE.type == "cuda" else "cuda:sm90"):
        router.bind(24, torch.float32)
    assert isinstance(router.selection.kernel, TritonRouting)
    after = router(logits)
    assert torch.equal(after.ids, before.ids) and after.router_logits is logits
    torch.testing.assert_close(after.weights, before.weights)
    with Execution(kernels=(("routing", "torch"),)):
        router.bind(24, torch.float32)
    assert isinstance(router.selection.kernel, TorchRouting)


def test_a_plan_says_which_kernel_routes_and_why(tmp_path):
    write_moe(tmp_path / "m", "qwen3_moe")
    (planned,) = plan(tmp_path / "m", device="cuda:sm90", dtype="bfloat16").routing
    assert planned["kernel"] == "triton_routing" and planned["refused"] == []
    assert all(prefix.endswith("mlp.gate") for prefix in planned["prefixes"])
    (planned,) = plan(tmp_path / "m", device="cpu").routing
    assert planned["kernel"] == "torch"
    (refused,) = planned["refused"]
    assert refused == {"kernel": "triton_routing", "why": "needs a GPU", "cause": "device", "fix": ""}
