"""A damaged checkpoint: one error that names what is wrong, before anything is read; never a half-loaded model.

The files themselves (headers, offsets, links) are for tests/weights; here the tensors are those of a tiny AWQ Llama.
"""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from pymllm.api import load_model
from pymllm.errors import CheckpointError, ShardingError
from pymllm.parallel import Parallel

from .. import checkpoints
from ..checkpoints import AWQ, save_tensors, write_checkpoint, write_index
from .refusal import refused

PROJECTIONS = [f"self_attn.{part}_proj" for part in "qkvo"] + [
    f"mlp.{part}_proj" for part in ("gate", "up", "down")
]
NORMS = ("input_layernorm", "post_attention_layernorm")
TENSORS = [
    "model.embed_tokens.weight",
    *(f"model.layers.0.{layer}.{name}" for layer in PROJECTIONS for name in ("qweight", "qzeros", "scales")),
    *(f"model.layers.0.{norm}.weight" for norm in NORMS),
    "model.norm.weight",
    "lm_head.weight",
]
SCALES = "model.layers.0.mlp.down_proj.scales"
each_tensor = pytest.mark.parametrize("name", TENSORS)


def test_the_good_checkpoint_has_exactly_these_tensors_and_loads(good, reads):
    assert set(good.tensors) == set(TENSORS)
    model = load_model(good.folder, device="cpu")
    assert {record.name for record in model.load_report.tensors if record.status == "loaded"} == set(TENSORS)
    assert sorted(reads) == sorted(TENSORS), "each tensor is read once"


# --- each tensor in turn


@each_tensor
def test_a_dropped_tensor_is_named(good, folder, reads, name):
    save_tensors(folder, {key: tensor for key, tensor in good.tensors.items() if key != name})
    error = refused(folder, reads)
    assert error.code == "missing" and error.tensor == name
    assert name in str(error) and str(folder) in str(error)


@each_tensor
def test_a_renamed_tensor_is_named_with_its_old_name(good, folder, reads, name):
    renamed = name[:-1] + "q"
    save_tensors(folder, {(renamed if key == name else key): tensor for key, tensor in good.tensors.items()})
    error = refused(folder, reads)
    lines = str(error).splitlines()
    assert "2 problems" in lines[0]
    (missing,) = (line for line in lines if line.startswith(f"  {name}: missing"))
    (extra,) = (line for line in lines if line.startswith(f"  {renamed}: unexpected"))
    assert renamed in missing, "the nearest name of what is missing"
    assert name in extra, "the nearest name of what is too much"


@each_tensor
def test_a_tensor_in_two_shards_is_named(good, folder, reads, name):
    tensors = good.tensors
    save_tensors(folder, tensors, shards=2)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    half = len(tensors) // 2
    first, second = dict(list(tensors.items())[:half]), dict(list(tensors.items())[half:])
    checkpoints.save_file(first | {name: tensors[name].clone()}, folder / files[0])
    checkpoints.save_file(second | {name: tensors[name].clone()}, folder / files[1])
    error = refused(folder, reads)
    assert error.code == "duplicate-tensor" and error.tensor == name
    assert files[0] in str(error) and files[1] in str(error)


@each_tensor
def test_a_tensor_that_lacks_a_row_is_named_with_both_shapes(good, folder, reads, name):
    full = good.tensors[name]
    save_tensors(folder, good.tensors | {name: full[:-1].clone()})
    error = refused(folder, reads)
    found = [full.shape[0] - 1, *full.shape[1:]]
    assert error.code == "shape" and error.tensor == name
    assert f"expected {list(full.shape)}, found {found}" in str(error)


@each_tensor
def test_a_file_cut_off_within_a_tensor_names_the_tensor_and_the_bytes(good, folder, reads, name):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    start, end = json.loads(content[8 : 8 + length])[name]["data_offsets"]
    cut = 8 + length + (start + end) // 2
    path.write_bytes(content[:cut])
    error = refused(folder, reads)
    assert error.code == "truncated" and error.tensor == name and str(path) in str(error)
    assert f"expected {len(content)} bytes, found {cut} bytes" in str(error)


@each_tensor
def test_a_wrong_dtype_is_named_with_both_dtypes(good, folder, reads, name):
    tensor = good.tensors[name]
    wrong = tensor.long() if tensor.dtype is torch.int32 else tensor.to(torch.float64)
    save_tensors(folder, good.tensors | {name: wrong})
    error = refused(folder, reads)
    assert error.code == "dtype" and error.tensor == name
    assert str(tensor.dtype)[6:] in str(error) and f"found {str(wrong.dtype)[6:]}" in str(error)


@pytest.mark.parametrize("name", [name for name in TENSORS if name.endswith("scales")])
@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf"), 0.0), ids=str)
def test_a_scale_that_is_no_usable_number_is_named_and_counted(good, folder, name, value):
    bad = good.tensors[name].clone()
    bad[0, 3] = bad[-1, -1] = value
    save_tensors(folder, good.tensors | {name: bad})
    with pytest.raises(CheckpointError) as caught:
        load_model(folder, device="cpu")
    assert caught.value.code == "bad-scale" and caught.value.tensor == name
    assert f"2 of {bad.numel()}" in str(caught.value) and "model.safetensors" in str(caught.value)


# --- other tensors


@pytest.mark.parametrize("extra", ("lm_head.bias", "model.layers.1.input_layernorm.weight", "something.else"))
def test_an_extra_tensor_is_refused_by_name(good, folder, reads, extra):
    save_tensors(folder, good.tensors | {extra: torch.zeros(4)})
    error = refused(folder, reads)
    assert error.code == "unexpected" and error.tensor == extra and extra in str(error)


def test_an_extra_tensor_of_a_known_kind_is_skipped_for_a_stated_reason(good, folder):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    frequencies = 10000.0 ** (-torch.arange(0, 32, 2) / 32)
    save_tensors(folder, good.tensors | {name: frequencies})
    (record,) = (r for r in load_model(folder, device="cpu").load_report.tensors if r.name == name)
    assert record.status == "skipped" and "rotary" in record.reason


def test_a_scale_of_the_wrong_shape_is_refused_even_if_it_would_broadcast(good, folder, reads):
    save_tensors(folder, good.tensors | {SCALES: good.tensors[SCALES][:1, :1].clone()})
    assert refused(folder, reads).code == "shape"


def test_a_transposed_weight_is_refused(good, folder, reads):
    name = "lm_head.weight"
    save_tensors(folder, good.tensors | {name: good.tensors[name].t().contiguous()})
    error = refused(folder, reads)
    assert error.code == "shape" and error.tensor == name


def test_everything_wrong_at_once_is_one_error_that_lists_it_all(good, folder, reads):
    tensors = good.tensors
    missing, renamed, wrong_shape, wrong_dtype = TENSORS[1], TENSORS[5], TENSORS[9], TENSORS[0]
    del tensors[missing]
    tensors["model.layers.0.self_attn.kk_proj.qzeros"] = tensors.pop(renamed)
    tensors[wrong_shape] = tensors[wrong_shape][:, :-1].clone()
    tensors[wrong_dtype] = tensors[wrong_dtype].double()
    tensors["extra"] = torch.zeros(1)
    save_tensors(folder, tensors)
    good.__dict__.pop("tensors")  # the fixture's cached tensors were changed
    error = refused(folder, reads)
    text = str(error)
    assert text.count("\n") == 6 and "6 problems" in text and "nothing was loaded" in text
    for line in (
        f"  {missing}: missing",
        f"  {renamed}: missing",
        f"  {wrong_shape}: wrong shape",
        f"  {wrong_dtype}: wrong dtype",
        "  model.layers.0.self_attn.kk_proj.qzeros: unexpected",
        "  extra: unexpected",
    ):
        assert line in text


def test_a_missing_bias_of_a_biased_family_is_named(tmp_path, reads):
    good = write_checkpoint(tmp_path / "m", "qwen2", AWQ(64), num_hidden_layers=1)
    name = "model.layers.0.self_attn.k_proj.bias"
    save_tensors(good.folder, {key: tensor for key, tensor in good.tensors.items() if key != name})
    assert refused(good.folder, reads).tensor == name


def test_a_scale_missing_from_a_quantised_layer_is_an_error_in_every_format(tmp_path, reads):
    for fmt in ("awq-g64", "fp8-block", "fp8-tensor", "fp8-tensor-static", "ct-channel", "ct-tensor-static"):
        good = write_checkpoint(tmp_path / fmt, "llama", fmt, num_hidden_layers=1)
        for name in [name for name in good.tensors if "down_proj" in name and "scale" in name]:
            save_tensors(good.folder, {key: tensor for key, tensor in good.tensors.items() if key != name})
            error = refused(good.folder, reads)
            assert error.code == "missing" and error.tensor == name, fmt


def test_a_scale_that_is_no_number_is_found_in_every_format(tmp_path):
    for fmt in ("fp8-block", "fp8-tensor", "fp8-tensor-static", "ct-block", "ct-channel", "ct-tensor-static"):
        good = write_checkpoint(tmp_path / fmt, "llama", fmt, num_hidden_layers=1)
        for name in [name for name in good.tensors if "q_proj" in name and "scale" in name]:
            bad = good.tensors[name].clone()
            bad.view(-1)[-1] = float("nan")
            save_tensors(good.folder, good.tensors | {name: bad})
            with pytest.raises(CheckpointError) as caught:
                load_model(good.folder, device="cpu")
            assert caught.value.code == "bad-scale" and caught.value.tensor == name, fmt


# --- the folder


def test_all_missing_shards_are_listed(good, folder, reads):
    save_tensors(folder, good.tensors, shards=3)
    files = sorted(path for path in folder.glob("*.safetensors"))
    for path in files[1:]:
        path.unlink()
    error = refused(folder, reads)
    assert error.code == "shards-missing" and all(path.name in str(error) for path in files[1:])


@pytest.mark.parametrize(
    "target", ("../outside.safetensors", "/etc/outside.safetensors", "sub/x.safetensors")
)
def test_an_index_that_leads_out_of_the_folder_is_refused(good, folder, reads, target):
    save_tensors(folder, good.tensors, shards=2)
    shutil.copy(next(folder.glob("*.safetensors")), folder.parent / "outside.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    write_index(folder, index | {TENSORS[0]: target})
    error = refused(folder, reads)
    assert error.code == "index-escapes" and error.tensor == TENSORS[0]


def test_pickles_alone_are_refused_with_a_way_to_convert_them(good, folder, reads):
    torch.save(good.tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    error = refused(folder, reads)
    assert (
        error.code == "pickle-only" and "pytorch_model.bin" in str(error) and "save_pretrained" in str(error)
    )


def test_an_empty_folder_and_a_missing_one_say_so(tmp_path, reads):
    assert refused(tmp_path, reads).code == "config-missing"
    assert refused(tmp_path / "absent", reads).code == "model-not-found"


# --- tensor parallel


def test_a_tp_size_that_heads_do_not_divide_names_those_that_do(folder, reads):
    with Parallel(0, 3):
        error = refused(folder, reads, ShardingError)
    assert "query heads" in str(error) and "Sizes that work for this model: 1, 2, 4." in str(error)


def test_a_tp_size_that_splits_a_group_names_those_that_do_not(tmp_path, reads):
    # 384 inputs of down_proj in groups of 128: halves cut the second group; all four heads would divide by two.
    good = write_checkpoint(tmp_path / "m", "llama", AWQ(128), num_hidden_layers=1, intermediate_size=384)
    with Parallel(1, 2):
        error = refused(good.folder, reads, ShardingError)
    text = str(error)
    assert "down_proj" in text and "192:384" in text and "group of 128" in text
    assert text.endswith("Sizes that work for this model: 1.")


def test_a_bad_checkpoint_is_refused_by_every_rank(good, folder, reads):
    save_tensors(folder, {key: tensor for key, tensor in good.tensors.items() if key != SCALES})
    for rank in range(2):
        with Parallel(rank, 2):
            assert refused(folder, reads).tensor == SCALES
