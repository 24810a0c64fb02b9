"""Adapters that are wrong, hostile or gone: one error that says what, and the model answers as before."""

from __future__ import annotations

import json
import os
import re
import resource

import pytest
import torch

import pymllm
from pymllm.adapters import enable_lora_for_model, load_lora_config, load_lora_weights, loaded_adapters
from pymllm.engine.sampling import SamplingParams
from pymllm.errors import CheckpointError, ConfigError, PymllmError, RequestError
from pymllm.layers.lora import LayerAdapter

from ..forward import logits_of
from .test_peft_adapters import BASE, GOLDEN, base, copied, golden

PARAMS = SamplingParams(max_tokens=12, ignore_eos=True, temperature=0.0)


@pytest.fixture(scope="module")
def model():
    return base()


def refused(model, folder, kind=PymllmError) -> PymllmError:
    """Load an adapter that must be refused; nothing of it may stay."""
    before = {name: param for name, param in model.named_parameters()}
    with pytest.raises(kind) as caught:
        load_lora_weights(model, folder, name="bad")
    assert not loaded_adapters(model) and {n: p for n, p in model.named_parameters()} == before
    return caught.value


# --- settings


@pytest.mark.parametrize(
    ("setting", "value"),
    (
        *(("use_rslora", value) for value in ("False", "true", 0, 1, [], {})),
        *(("fan_in_fan_out", value) for value in ("False", 1)),
        *(("r", value) for value in (0, -1, 2**31, 8.0, "8", True, [8], None)),
        *(("lora_alpha", value) for value in ("8", True, 1e39, -1e39, 10**39, [1])),
        *(("use_dora", value) for value in ("False", 0, 1, True, "x")),
        *(("bias", value) for value in ("all", "lora_only", True, False, 0, "")),
        *(("modules_to_save", value) for value in (["lm_head"], "lm_head", 0)),
        *(("lora_bias", True), ("lora_bias", "False"), ("use_qalora", True), ("use_bdlora", {"a": 1})),
        *(("alora_invocation_tokens", [1]), ("trainable_token_indices", {"embed_tokens": [0]})),
        *(("init_lora_weights", value) for value in ("pissa", "corda", "loftq", "olora", 1, 0, [])),
        *(("layers_to_transform", value) for value in ("0", [True], ["0"], 1.0, [[0]])),
        *(("layers_pattern", value) for value in ("(", ["(", "layers"], 3, "x" * 1001)),
        *(("target_modules", value) for value in ([], None, "", 3, [1], [""], {"q": 1}, "(", "x" * 1001)),
        *(("target_modules", value) for value in ("(" * 60 + ")" * 60, r"(\w*)(\w*)\1\2x")),
        *(
            ("rank_pattern", value)
            for value in ({"q": 0}, {"q": True}, {"q": 2**31}, {"(": 2}, [], "x", 0, False)
        ),
        *(("rank_pattern", value) for value in ({"q)|(v": 2}, {"x" * 995: 2})),
        *(("alpha_pattern", value) for value in ({"q": "1"}, {"q": 1e39}, {"q": 10**39}, {")": 1}, ["q"])),
        *(("peft_type", value) for value in ("LOHA", None, "lora", ["LORA"], {})),
        *(("velora_config", {"rank": 1}), ("unheard_of", "yes"), ("unheard_of", 3)),
    ),
)
def test_a_setting_that_cannot_be_honoured_is_refused_by_its_name(tmp_path, setting, value):
    folder = copied(tmp_path, "attention")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {setting: value}))
    if value is None and setting == "r":
        value = "null"
    with pytest.raises(ConfigError, match=setting) as caught:
        load_lora_config(folder)
    assert caught.value.code == "adapter-config" and len(str(caught.value)) < 3000


@pytest.mark.parametrize(
    ("text", "code"),
    (
        ('"r": 4, "r": 8', "duplicate"),
        ('"lora_alpha": NaN', "json"),
        ('"lora_alpha": Infinity', "json"),
        ('"lora_alpha": 1e999', "adapter-config"),
        ('"rank_pattern": {"q": 1, "q": 2}', "duplicate"),
        ('"r": 4', "ok"),
        ('"r": ' + "[" * 100_000, "json"),
    ),
)
def test_the_text_of_the_settings_is_read_strictly(tmp_path, text, code):
    folder = copied(tmp_path, "attention")
    raw = json.loads((folder / "adapter_config.json").read_text())
    raw = {key: value for key, value in raw.items() if f'"{key}"' not in text}
    (folder / "adapter_config.json").write_text(json.dumps(raw)[:-1] + f", {text}}}")
    if code == "ok":
        assert load_lora_config(folder).rank == 4
        return
    with pytest.raises(PymllmError) as caught:
        load_lora_config(folder)
    assert code in caught.value.code


def test_a_negative_alpha_takes_the_adapter_away_as_peft_does(tmp_path):
    plain = load_lora_config(copied(tmp_path / "a", "attention", lora_alpha=6))
    taken = load_lora_config(copied(tmp_path / "b", "attention", lora_alpha=-6))
    assert taken.scaling_of("q_proj") == -plain.scaling_of("q_proj")


# --- patterns

NAME = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    "pattern",
    (".?" * 60 + "Z", "(a+)+Z", ".*.*.*.*.*.*Z", r"(\w+\.?)+Z", "(?:.*l){12}Z", "(?!(.*.*)*Z).*(.*)*Z"),
)
def test_hostile_patterns_are_answered(tmp_path, pattern):
    config = load_lora_config(
        copied(
            tmp_path,
            "attention",
            target_modules=pattern,
            exclude_modules=pattern,
            rank_pattern={pattern: 3},
            alpha_pattern={pattern: 3},
            layers_pattern=[pattern],
            layers_to_transform=[1],
        )
    )
    assert not config.targets(NAME, "linear") and not config.targets("a" * 190, "linear")
    assert config.rank_of(NAME) == load_lora_config(GOLDEN / "attention").rank


@pytest.mark.parametrize(
    ("settings", "found"),
    (
        ({"target_modules": r".*\.(q|k)_proj"}, True),
        ({"target_modules": r"q_proj"}, False),
        ({"target_modules": r"^(model(?=\.).*\.(k_proj|q_proj))$"}, True),
        ({"target_modules": r"^(?!.*self_attn).*_proj"}, False),
        ({"target_modules": ["q_proj"], "exclude_modules": r".*layers\.1\..*"}, False),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, True),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0]}, False),
        ({"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"}, True),
        ({"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": ["h", "l.y.rs"]}, True),
        ({"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "blocks"}, False),
    ),
)
def test_layers_are_chosen_as_peft_chooses_them(  # peft.tuners.tuners_utils.check_target_module_exists
    tmp_path, settings, found
):
    config = load_lora_config(copied(tmp_path, "attention", **settings))
    assert config.targets(NAME, "linear") == found


@pytest.mark.parametrize(
    "key", ("q_proj", r"layers\.1\..*", "self_attn.q_proj", "proj", "^q_proj", r"(?=q)q_pro\w")
)
def test_ranks_follow_patterns_as_pefts_do(tmp_path, key):
    config = load_lora_config(copied(tmp_path, "attention", rank_pattern={key: 77}))
    theirs = re.match(rf"(.*\.)?({key})$", NAME)  # peft.utils.other.get_pattern_key
    assert (config.rank_of(NAME) == 77) == (theirs is not None)


# --- tensors


@pytest.mark.parametrize("rank", (10**6, 2**30, 2**31 - 1))
@pytest.mark.parametrize("where", ("r", "rank_pattern"))
def test_a_huge_rank_is_a_wrong_shape_before_any_memory_is_taken(tmp_path, model, rank, where):
    settings = {"r": rank} if where == "r" else {"rank_pattern": {"q_proj": rank}}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    error = refused(model, copied(tmp_path, "attention", **settings), CheckpointError)
    assert str(rank) in str(error)
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000
    )  # KiB: A alone would have 256 MB


def fill(value):
    def edit(tensors):
        tensor = next(iter(tensors.values()))
        tensor.view(-1)[:3] = value

    return edit


def change(make):
    def edit(tensors):
        name = next(name for name in tensors if name.endswith("lora_A.weight"))
        made = make(tensors[name])
        if made is None:
            del tensors[name]
        else:
            tensors[name] = made.contiguous()

    return edit


def add(name, tensor=None):
    return lambda tensors: tensors.update({name: torch.zeros(2) if tensor is None else tensor})


LAYER = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("edit", "said"),
    (
        (fill(float("nan")), "3 that are NaN or infinite"),
        (fill(float("inf")), "3 that are NaN or infinite"),
        (change(lambda A: A.int()), "found int32"),
        (change(lambda A: A.bool()), "found bool"),
        (change(lambda A: A[:2]), "lora_A"),
        (change(lambda A: torch.cat([A, A])), "lora_A"),
        (change(lambda A: A.t()), "lora_A"),
        (change(lambda A: A[None]), "lora_A"),
        (change(lambda A: A[:0]), "lora_A"),
        (change(lambda A: None), "missing"),
        (add(f"{LAYER}.lora_A.other"), "lora_A.other"),
        (add(f"{LAYER}.lora_magnitude_vector"), "lora_magnitude_vector"),
        (add(f"{LAYER}.lora_B.bias"), "lora_B.bias"),
        (add("base_model.model.model.layers.99.self_attn.q_proj.lora_A.weight"), "layers.99"),
        (add("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"), "leave its layer out"),
        (add("lm_head.weight"), "lm_head.weight"),
        (change(lambda A: A * 1e38 * 3e4), "NaN or infinite"),
        (lambda tensors: [tensor.fill_(1e25) for tensor in tensors.values()], "out of range"),
        (lambda tensors: tensors.clear(), "missing"),
    ),
)
def test_tensors_that_do_not_fit_are_named(tmp_path, model, edit, said):
    assert said in str(refused(model, copied(tmp_path, "attention", edit), CheckpointError))


def test_a_scaling_out_of_range_is_refused(tmp_path, model):
    assert "out of range" in str(
        refused(model, copied(tmp_path, "attention", lora_alpha=3e38), CheckpointError)
    )


def test_files_that_are_none(tmp_path, model):
    folder = copied(tmp_path, "attention")
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    content = weights.read_bytes()
    for file in (weights, config):
        kept = file.read_bytes()
        for make in (
            os.mkfifo,
            os.mkdir,
            lambda path: os.symlink(path, path),
            lambda path: path.touch(),
            lambda _: None,
        ):
            file.unlink()
            make(file)
            refused(model, folder)
            if file.is_dir():
                file.rmdir()
            elif file.is_symlink() or file.exists():
                file.unlink()
            file.write_bytes(kept)
    for cut in (0, 7, 100, len(content) - 1):
        weights.write_bytes(content[:cut])
        refused(model, folder, CheckpointError)
    weights.unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04.")
    assert "safe_serialization" in str(refused(model, folder, CheckpointError))


# --- names, and failures on the way


def test_each_name_is_an_adapter_of_its_own(model):
    names = ("A", "B", "a.b", "a_2e_b", "default", "scaling", "é", "weight")
    for name in names:
        load_lora_weights(model, GOLDEN / "attention", name=name, activate=False)
    assert set(loaded_adapters(model)) == set(names)
    for name in names:
        pymllm.adapters.unload_lora_weights(model, name)
    assert not loaded_adapters(model)
    for name in ("", "\x1b[2J", 3, None):
        with pytest.raises(ConfigError) as caught:
            load_lora_weights(model, GOLDEN / "attention", name=name)
        assert caught.value.code == "lora-name"
        with pytest.raises(ConfigError):
            enable_lora_for_model(model, load_lora_config(GOLDEN / "attention"), name=name)


@pytest.mark.parametrize("fails", ("stack", "read"))
def test_where_memory_runs_out_no_layer_has_the_adapter(model, monkeypatch, fails):
    calls = []

    def run_out(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise MemoryError

    ids, _ = golden("attention")
    before = logits_of(model, ids)
    if fails == "stack":
        monkeypatch.setattr(LayerAdapter, "stack", run_out)
    else:
        monkeypatch.setattr(pymllm.adapters.loading, "_read", run_out)
    with pytest.raises(MemoryError):
        load_lora_weights(model, GOLDEN / "attention", name="x")
    assert not loaded_adapters(model) and torch.equal(logits_of(model, ids), before)


def test_a_merge_that_fails_is_undone(monkeypatch):
    llm = pymllm.LLM(BASE, device="cpu", dtype="float32", adapters={"x": GOLDEN / "attention"})
    ids, _ = golden("attention")
    plain, adapted = llm.logits(ids), llm.logits(ids, adapter="x")
    real, calls = pymllm.layers.lora._with_delta, []

    def run_out(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise MemoryError
        return real(*arguments)

    monkeypatch.setattr(pymllm.layers.lora, "_with_delta", run_out)
    with pytest.raises(MemoryError):
        llm.merge_adapter("x")
    assert torch.equal(llm.logits(ids), plain) and torch.equal(llm.logits(ids, adapter="x"), adapted)
    llm.merge_adapter("x")
    llm.unmerge_adapter()
    assert torch.equal(llm.logits(ids), plain)


@pytest.mark.parametrize(
    ("rank", "alpha", "code"),
    (
        *((rank, 8.0, "lora-rank") for rank in (-1, True, 1.5, "4")),
        *((4, alpha, "lora-scaling") for alpha in (float("nan"), float("inf"), -1e40, 1e308)),
        (2**45, 8.0, "lora-memory"),
    ),
)
def test_a_layer_refuses_what_no_adapter_has(model, rank, alpha, code):
    layer = model.model.layers[0].mlp.down_proj
    with pytest.raises(ConfigError) as caught:
        layer.init_lora(rank, alpha)
    assert caught.value.code == code and not layer.adapters


# --- gone in mid-stream


@pytest.fixture
def llm(tmp_path):
    return pymllm.LLM(
        BASE, device="cpu", dtype="float32", adapters={n: GOLDEN / n for n in ("attention", "stabilised")}
    )


def other_weights(tmp_path):
    def halve(tensors):
        for tensor in tensors.values():
            tensor /= 2

    return copied(tmp_path, "attention", halve)


CHANGES = {
    "unloaded": (lambda llm, _: llm.unload_adapter("attention"), "was unloaded"),
    "replaced": (lambda llm, path: llm.load_adapter("attention", other_weights(path)), "was replaced"),
    "loaded anew": (lambda llm, _: llm.load_adapter("attention", GOLDEN / "attention"), "was replaced"),
    "hidden": (lambda llm, _: llm.merge_adapter("stabilised"), "is hidden by 'stabilised'"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_answer_whose_adapter_goes_ends_with_an_error(llm, tmp_path, change):
    ids = golden("attention")[0].tolist()
    whole = llm.generate(ids, PARAMS, adapter="attention")[0].token_ids
    act, said = CHANGES[change]
    stream, tokens = llm.stream(ids, PARAMS, adapter="attention"), []
    for _ in range(4):
        tokens += next(stream).token_ids
    act(llm, tmp_path)
    with pytest.raises(RequestError, match=said) as caught:
        for piece in stream:
            tokens += piece.token_ids
    assert caught.value.code == "adapter-gone" and "'attention'" in str(caught.value)
    assert tuple(tokens) == whole[: len(tokens)] and len(tokens) == 4
    if change == "unloaded":
        llm.load_adapter("attention", GOLDEN / "attention")
        assert llm.generate(ids, PARAMS, adapter="attention")[0].token_ids == whole


def test_others_go_on_when_an_adapter_goes(llm):
    ids = golden("attention")[0].tolist()
    names = (None, "attention", "stabilised", "attention")
    alone = [llm.generate(ids, PARAMS, adapter=name)[0].token_ids for name in names]
    with llm.session() as session:
        requests = [session.add(ids, PARAMS, name, number) for number, name in enumerate(names)]
        for _ in range(3):
            session.step()
        waits = session.add(ids, PARAMS, "attention", 4)
        llm.unload_adapter("attention")
        while session.unfinished:
            session.step()
    for request, tokens, name in zip(requests, alone, names, strict=True):
        if name == "attention":
            assert request.error.code == "adapter-gone"
        else:
            assert request.error is None and tuple(request.answer) == tokens
    assert waits.error.code == "adapter-gone" and not waits.answer
    assert llm.engine.idle


def test_an_adapter_that_goes_within_a_step_gives_no_token(llm, monkeypatch):
    ids = golden("attention")[0].tolist()
    with llm.session() as session:
        kept = session.add(ids, PARAMS, None, 0)
        lost = session.add(ids, PARAMS, "attention", 1)
        session.step()
        before = list(lost.answer)
        layer = llm.model.model.layers[0].mlp

        def unload(*_):
            if "attention" in llm.adapters:
                llm.unload_adapter("attention")

        hook = layer.register_forward_pre_hook(unload)
        session.step()
        hook.remove()
        assert lost.error.code == "adapter-gone" and lost.answer == before and kept.error is None
