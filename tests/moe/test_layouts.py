"""Experts one by one and all in one tensor, with one method or several, and what is wrong with a checkpoint of them."""

# E experts, H hidden size, I intermediate size, O out_features

from __future__ import annotations

import pytest
import torch

import pymllm
from pymllm.api import load_model
from pymllm.checking.verify import verify
from pymllm.errors import CheckpointError, RuleError, ShardingError
from pymllm.moe.experts import Experts
from pymllm.parallel import Parallel, simulate
from pymllm.planning.make_plan import plan

from ..checkpoints import edit_config, encode_e4m3, load_tensors, relative_error, save_tensors
from ..forward import logits_of
from ..moe_checkpoints import FAMILIES, write_moe

TOLERANCE = 1e-5


def assert_equal_on(checkpoint, *ranks, **options):
    """ranks: (size, expert_parallel)."""
    for size, expert_parallel in ranks:
        found = simulate(
            size,
            lambda _: logits_of(
                load_model(checkpoint.folder, device="cpu", dtype="float32", **options), checkpoint.ids
            ),
            expert_parallel=expert_parallel,
        )
        for logits in found:
            assert relative_error(logits, checkpoint.logits()) <= TOLERANCE, (size, expert_parallel)


RANKS = ((1, False), (2, False), (2, True), (4, False))


@pytest.mark.parametrize("family", ("mixtral", "qwen2_moe", "deepseek_v3"))
@pytest.mark.parametrize("fmt", ("none", "none-bf16"))
def test_all_experts_of_a_layer_in_one_tensor(tmp_path, family, fmt):
    checkpoint = write_moe(tmp_path / "m", family, fmt, stacked=True)
    assert any(name.endswith("mlp.experts.gate_up_proj") for name in checkpoint.tensors)
    assert_equal_on(checkpoint, *RANKS)


def store_in_fp8(checkpoint):
    """Experts all in one tensor with block scales beside it, as transformers' own FP8 experts are saved."""
    tensors = dict(checkpoint.tensors)
    state = checkpoint.model.state_dict()
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        encoded = [encode_e4m3(expert, (128, 128)) for expert in tensors[name]]
        tensors[name] = torch.stack([stored.view(torch.uint8) for stored, _, _ in encoded]).view(
            torch.float8_e4m3fn
        )
        tensors[f"{name}_scale_inv"] = torch.stack([scales for _, scales, _ in encoded])
        state[name].copy_(torch.stack([meant for _, _, meant in encoded]))
    save_tensors(checkpoint.folder, tensors)
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    edit_config(checkpoint.folder, quantization_config=settings)


def test_stacked_experts_in_a_quantised_format(tmp_path):
    checkpoint = write_moe(tmp_path / "m", "mixtral", stacked=True)
    store_in_fp8(checkpoint)
    # gate ends, and up begins, on a block: ranks can share the stacked outputs.
    assert_equal_on(checkpoint, *RANKS[:3])
    planned = plan(checkpoint.folder, device="cpu")
    layer = planned.layer("model.layers.0.mlp.experts.gate_up_proj")
    assert (layer.kind, layer.method, layer.shape) == ("experts", "fp8", [256, 128])


def to_int8(weight):
    """[O, I] as whole rows of symmetric int8 mean it: scales in float16, codes -128..127."""
    scales = (weight.abs().amax(-1, keepdim=True) / 127.5).half().float()
    return (weight / scales).round().clamp(-128, 127) * scales


def round_experts(checkpoint, chosen=lambda layer, expert, product: True):
    """transformers' model with the chosen experts' products rounded to int8.  product: gate, up or down."""
    oss = checkpoint.model.config.model_type == "gpt_oss"
    for name, tensor in checkpoint.model.state_dict().items():
        if ".experts." not in name or tensor.ndim != 3:
            continue
        layer = int(name.split(".")[2])
        for index, expert in enumerate(tensor):
            weight = expert.t() if oss else expert
            if name.endswith("down_proj"):
                parts = {"down": slice(None)}
            elif oss:
                parts = {"gate": slice(0, None, 2), "up": slice(1, None, 2)}
            else:
                half = weight.shape[0] // 2
                parts = {"gate": slice(0, half), "up": slice(half, None)}
            for product, rows in parts.items():
                if chosen(layer, index, product):
                    weight[rows] = to_int8(weight[rows])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rule_for_the_experts_by_their_checkpoint_names(tmp_path, family):
    checkpoint = write_moe(tmp_path / "m", family)
    round_experts(checkpoint)
    # An expert whole keeps its rows' scales; a share of each has others, of the inputs it has.
    assert_equal_on(checkpoint, (1, False), (2, True), quant="**.experts.**=int8")


@pytest.mark.parametrize(
    "rules, chosen",
    (
        (["**.experts.*.down_proj=int8"], lambda layer, expert, product: product == "down"),
        (["**.experts.*.up_proj=int8"], lambda layer, expert, product: product == "up"),
        (["**.experts.3.**=int8"], lambda layer, expert, product: expert == 3),
        (
            ["model.layers.0.mlp.experts.1.gate_proj=none", "model.layers.0.**.experts.**=int8"],
            lambda layer, expert, product: layer == 0 and not (expert == 1 and product == "gate"),
        ),
    ),
)
def test_experts_and_products_may_have_methods_of_their_own(tmp_path, rules, chosen):
    checkpoint = write_moe(tmp_path / "m", "olmoe")
    round_experts(checkpoint, chosen)
    assert_equal_on(checkpoint, (1, False), (2, True), quant=rules)
    assert verify(checkpoint.folder, rules, device="cpu", dtype="float32").ok
    found = plan(checkpoint.folder, rules, device="cpu")
    for layer in found.layers:
        if layer.kind == "experts":
            parts = layer.prefix.split(".")
            expected = chosen(int(parts[2]), int(parts[5]), parts[6].removesuffix("_proj"))
            assert layer.method == ("int8" if expected else "none"), layer.prefix


def test_only_a_rule_that_names_a_router_quantises_it(tmp_path):
    checkpoint = write_moe(tmp_path / "m", "qwen2_moe")
    for rule in ("**=int8", "**.mlp.**=int8", "re:.*mlp.*=int8"):
        layers = {layer.prefix: layer for layer in plan(checkpoint.folder, rule, device="cpu").layers}
        assert layers["model.layers.0.mlp.gate"].method == "none", rule
        assert layers["model.layers.0.mlp.shared_expert_gate"].method == "none", rule
        assert layers["model.layers.0.mlp.shared_expert.up_proj"].method == "int8", rule
    layers = {
        layer.prefix: layer for layer in plan(checkpoint.folder, "**.mlp.gate=int8", device="cpu").layers
    }
    assert layers["model.layers.1.mlp.gate"].method == "int8"


def test_a_rule_that_matches_no_expert_names_the_nearest(tmp_path):
    checkpoint = write_moe(tmp_path / "m", "mixtral")
    with pytest.raises(RuleError, match=r"experts\.\d\.w\d"):
        plan(checkpoint.folder, "model.layers.0.block_sparse_moe.experts.0.w9=int8", device="cpu")


# --- what is planned is what is loaded, and every tensor is accounted for


@pytest.mark.parametrize("expert_parallel", (False, True), ids=("tp", "ep"))
@pytest.mark.parametrize(
    "family, fmt", (("qwen3_moe", "awq-g32"), ("gpt_oss", "mxfp4"), ("deepseek_v3", "fp8-block"))
)
def test_ranks_load_what_they_plan_and_read_their_share_alone(tmp_path, family, fmt, expert_parallel):
    checkpoint = write_moe(tmp_path / "m", family, fmt)

    def work(parallel):
        planned = plan(checkpoint.folder, device="cpu")
        return planned.totals, load_model(checkpoint.folder, device="cpu").load_report

    for size in (1, 2, 4):
        read = 0
        for totals, report in simulate(size, work, expert_parallel=expert_parallel):
            assert report.final_bytes == totals["weight_bytes"]
            names = [record.name for record in report.tensors]
            assert sorted(names) == sorted(checkpoint.tensors) and len(set(names)) == len(names)
            reasons = {record.reason for record in report.tensors if record.status == "skipped"}
            one_by_one = expert_parallel and size > 1 and family != "gpt_oss"
            assert reasons == ({"another rank holds this expert"} if one_by_one else set())
            read += sum(r.nbytes for r in report.tensors if ".experts." in r.name)
        experts = {n: t for n, t in checkpoint.tensors.items() if ".experts." in n}
        shared = sum(
            t.nbytes for n, t in experts.items() if n.endswith(("scale_inv", "bias", "zeros", "scales"))
        )
        whole = sum(t.nbytes for t in experts.values())
        assert whole <= read <= whole + size * shared


@pytest.mark.parametrize(
    "family, fmt", (("mixtral", "none"), ("gpt_oss", "mxfp4"), ("deepseek_v2", "awq-g32"))
)
def test_verify_checks_every_expert(tmp_path, family, fmt):
    checkpoint = write_moe(tmp_path / "m", family, fmt)
    model = load_model(checkpoint.folder, device="cpu", dtype="float32")
    found = verify(model)
    assert found.ok and sum(layer.kind == "experts" for layer in found.layers) == (
        1 if "deep" in family else 2
    )
    experts = next(module for module in model.modules() if isinstance(module, Experts))
    packed = experts.bound.packed
    last = next(iter(packed.values()))[-1]
    last.view(torch.uint8).flatten()[:64] ^= 1  # of the last expert alone
    bad = [layer for layer in verify(model).layers if not layer.ok]
    assert [layer.prefix for layer in bad] == [experts.prefix] and not bad[0].packed_exact


# --- what can be wrong


def rewrite(checkpoint, change):
    tensors = load_tensors(checkpoint.folder)
    change(tensors)
    save_tensors(checkpoint.folder, tensors)


def fuse(tensors, prefix, suffix):
    """The tensors of gate and up of all experts as one, as a writer would that fuses some and not others."""
    pairs = [
        torch.cat([tensors.pop(f"{prefix}.{e}.{part}.{suffix}") for part in ("gate_proj", "up_proj")])
        for e in range(6)
    ]
    tensors[f"{prefix}.gate_up_proj_{suffix.removeprefix('weight_')}"] = torch.stack(pairs)


def test_weights_and_scales_of_experts_that_disagree_in_layout_name_the_first_such_tensor(tmp_path):
    checkpoint = write_moe(tmp_path / "m", "qwen3_moe", "ct-channel")
    prefix = "model.layers.0.mlp.experts"
    rewrite(checkpoint, lambda tensors: fuse(tensors, prefix, "weight_scale"))
    for attempt in (plan, load_model):
        with pytest.raises(
            CheckpointError, match="other tensors of that layer hold one expert each"
        ) as caught:
            attempt(checkpoint.folder, device="cpu")
        assert caught.value.tensor == f"{prefix}.gate_up_proj_scale"


def test_an_expert_that_is_missing_or_one_too_many(tmp_path):
    checkpoint = write_moe(tmp_path / "m", "mixtral")
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    rewrite(checkpoint, lambda tensors: tensors.pop(name))
    for rank in range(2):  # of an expert that this rank does not hold, too
        with (
            Parallel(rank, 2, expert_parallel=True),
            pytest.raises(CheckpointError, match="missing") as caught,
        ):
            plan(checkpoint.folder, device="cpu")
        assert caught.value.tensor == name
    extra = name.replace("experts.3", "experts.5")
    rewrite(checkpoint, lambda t: t.update({name: torch.zeros(128, 128), extra: torch.zeros(128, 128)}))
    with pytest.raises(CheckpointError, match="unexpected") as caught:
        plan(checkpoint.folder, device="cpu")
    assert caught.value.tensor == extra


def test_a_wrong_shape_of_stacked_experts(tmp_path):
    checkpoint = write_moe(tmp_path / "m", "gpt_oss")
    name = "model.layers.0.mlp.experts.down_proj"
    rewrite(checkpoint, lambda tensors: tensors.update({name: tensors[name][:4].clone()}))
    with pytest.raises(CheckpointError, match=r"expected \[5, 128, 128\], found \[4, 128, 128\]"):
        plan(checkpoint.folder, device="cpu")


def test_a_config_that_claims_more_experts_than_tensors_can_hold(tmp_path):
    checkpoint = write_moe(tmp_path / "m", "qwen3_moe")
    edit_config(checkpoint.folder, num_experts=2**40)
    with pytest.raises(CheckpointError, match="longest side"):
        plan(checkpoint.folder, device="cpu")


def test_sizes_that_shares_cannot_have_but_whole_experts_can(tmp_path):
    """Experts of 96 features in groups of 32 cannot be shared by two or four ranks."""
    checkpoint = write_moe(tmp_path / "m", "qwen3_moe", "awq-g32", moe_intermediate_size=96)
    with Parallel(1, 4), pytest.raises(ShardingError, match=r"1\. With expert_parallel: 1, 2, 4"):
        plan(checkpoint.folder, device="cpu")
    assert_equal_on(checkpoint, (4, True))


def test_a_rank_may_hold_no_expert(tmp_path):
    checkpoint = write_moe(tmp_path / "m", "mixtral", "awq-g32", num_local_experts=2)
    assert_equal_on(checkpoint, (4, True))


def test_dense_models_say_that_expert_parallelism_divides_nothing(tmp_path):
    from ..checkpoints import write_checkpoint

    checkpoint = write_checkpoint(tmp_path / "m", "llama", num_hidden_layers=1)
    with Parallel(0, 2, expert_parallel=True):
        assert any("no experts" in note for note in plan(checkpoint.folder, device="cpu").notes)


def test_generation_through_the_cache_continues_as_transformers_does(tmp_path):
    checkpoint = write_moe(tmp_path / "m", "gpt_oss", "mxfp4")
    prompt = checkpoint.ids[:9].tolist()
    llm = pymllm.LLM(checkpoint.folder, device="cpu", dtype="float32")
    answer = llm.generate(prompt, pymllm.SamplingParams(temperature=0.0, max_tokens=8))[0]
    expected = list(prompt)
    for _ in range(8):
        expected.append(int(checkpoint.logits(torch.tensor(expected))[-1].argmax()))
    assert list(answer.token_ids) == expected[len(prompt) :]
