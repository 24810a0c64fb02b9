"""Models of a hub: what a plan reads, what a load downloads, and what each fault of a hub says."""

from __future__ import annotations

import json
import struct

import huggingface_hub.constants as constants
import pytest
import torch
from safetensors.torch import save

import pymllm
from pymllm.cli import main
from pymllm.errors import CheckpointError, ConfigError
from pymllm.loading.load import load_prepared
from pymllm.loading.prepare import prepare
from pymllm.weights import hub as hub_module
from pymllm.weights.gguf_choice import choose_gguf
from pymllm.weights.gguf_file import GGUFFile
from pymllm.weights.hub import HubName, parse_hub_name
from pymllm.weights.opening import resolve_model_path
from pymllm.weights.shipped import shipped_model

from ..gguf_models import write_model
from ..hub_server import MockHub, Sparse

SHIPPED = shipped_model()
FILES = {path.name: path.read_bytes() for path in SHIPPED.iterdir() if path.is_file()}
WEIGHTS = "model.safetensors"


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """Start hubs that the client asks in place of the real one, with an empty cache."""
    started = []

    def start(repositories):
        hub = MockHub(repositories)
        started.append(hub)
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr("pymllm.weights.remote.RETRIES", 0)
        return hub

    monkeypatch.setenv("PYMLLM_CACHE", str(tmp_path / "packed"))
    monkeypatch.chdir(tmp_path)
    yield start
    for hub in started:
        hub.close()


def header_bytes(data):
    return 8 + int.from_bytes(data[:8], "little")


def test_a_plan_reads_headers_and_a_load_the_rest(serve):
    hub = serve({"org/tiny": FILES})
    hub.to_cdn = True
    prepared = prepare("org/tiny")
    assert hub.given[WEIGHTS] == header_bytes(FILES[WEIGHTS])
    assert not prepared.checkpoint.files[0].path.exists()
    assert not hub.given["tokenizer.json"]
    model = load_prepared(prepared, progress=False)
    assert hub.given["tokenizer.json"] == len(FILES["tokenizer.json"])
    assert prepared.checkpoint.files[0].path.read_bytes() == FILES[WEIGHTS]
    local = load_prepared(prepare(SHIPPED), progress=False)
    for (name, one), (_, other) in zip(model.state_dict().items(), local.state_dict().items(), strict=True):
        assert torch.equal(one, other), name
    hub.given.clear()
    assert pymllm.plan("org/tiny").totals == pymllm.plan(SHIPPED).totals
    assert hub.given[WEIGHTS] == 0


def large_model(shards, layers, hidden, inner, vocabulary):
    """Make the config, the index and the headers of a Llama of bfloat16, without its tensors."""
    tensors = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "lm_head.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(layers):
        own = f"model.layers.{layer}"
        tensors |= {f"{own}.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        tensors |= {f"{own}.mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        tensors[f"{own}.mlp.down_proj.weight"] = (hidden, inner)
        tensors |= {f"{own}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    files, weight_map = {}, {}
    for shard in range(shards):
        name, header, end = f"model-{shard:05d}.safetensors", {}, 0
        for tensor in list(tensors)[shard::shards]:
            shape = tensors[tensor]
            start, end = end, end + 2 * torch.Size(shape).numel()
            header[tensor], weight_map[tensor] = (
                {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]},
                name,
            )
        text = json.dumps(header).encode()
        files[name] = Sparse(struct.pack("<Q", len(text)) + text, 8 + len(text) + end)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": hidden,
              "intermediate_size": inner,
              "num_hidden_layers": layers, "num_attention_heads": hidden // 128, "num_key_value_heads": hidden // 128,
              "vocab_size": vocabulary, "rms_norm_eps": 1e-5, "dtype": "bfloat16"}  # fmt: skip
    index = {"metadata": {}, "weight_map": weight_map}
    return {
        **files,
        "config.json": json.dumps(config).encode(),
        "model.safetensors.index.json": json.dumps(index).encode(),
    }


def test_a_model_of_hundreds_of_gigabytes_is_refused_before_any_of_it_is_downloaded(serve):
    files = large_model(30, 80, 8192, 28672, 128256)
    hub = serve({"org/large": files})
    with pytest.raises(ConfigError) as caught:
        pymllm.LLM("org/large", device="cpu", dtype="bfloat16")
    assert caught.value.code == "out-of-memory"
    weights = {name: data for name, data in files.items() if isinstance(data, Sparse)}
    assert sum(len(data) for data in weights.values()) > 140e9
    assert {name: hub.given[name] for name in weights} == {
        name: len(data.start) for name, data in weights.items()
    }


def test_weights_that_the_disk_has_no_room_for_are_not_begun(serve, monkeypatch):
    hub = serve({"org/tiny": FILES})
    prepared = prepare("org/tiny")
    monkeypatch.setattr(hub_module, "free_bytes", lambda path: 1000)
    hub.given.clear()
    with pytest.raises(CheckpointError, match="GB free") as caught:
        load_prepared(prepared, progress=False)
    assert caught.value.code == "disk-full" and not hub.given
    with pytest.raises(CheckpointError, match="GB free"):  # as `quantize` opens a model: whole
        resolve_model_path("org/tiny")
    assert not hub.given


def test_weights_that_change_between_plan_and_load_are_refused(serve):
    hub = serve({"org/tiny": FILES})
    prepared = prepare("org/tiny")
    other = bytearray(FILES[WEIGHTS])
    other[header_bytes(other) - 1 :: 1 << 30] = b"\x20"
    other[10] ^= 1
    hub.repositories["org/tiny"][WEIGHTS] = bytes(other)
    with pytest.raises(CheckpointError) as caught:
        load_prepared(prepared, progress=False)
    assert caught.value.code == "changed"


def test_a_stored_head_that_the_config_ties_is_compared_by_its_ranges(serve):
    """The verdict is that of local files, and only the first piece of each is read."""
    from safetensors.torch import load

    tensors = load(FILES[WEIGHTS])
    table = next(value for name, value in tensors.items() if name.endswith("embed_tokens.weight"))
    tensors["lm_head.weight"] = table.flip(0).contiguous()
    raw, config = save(tensors), {**json.loads(FILES["config.json"]), "tie_word_embeddings": True}
    hub = serve({"org/tied": {**FILES, WEIGHTS: raw, "config.json": json.dumps(config).encode()}})
    prepared = prepare("org/tied")
    assert not prepared.config.tie_word_embeddings
    assert hub.given[WEIGHTS] < len(raw)


def test_only_the_needed_files_are_downloaded(serve):
    wanted = ["config.json", WEIGHTS, "tokenizer.model", "merges.txt", "chat_template.jinja",
              "1_Pooling/config.json", "2_Dense/model.safetensors"]  # fmt: skip
    others = ["pytorch_model.bin", "modeling.py", "original/model.safetensors", "onnx/model.safetensors"]
    hub = serve({"org/name": {name: b"{}" for name in [*wanted, *others]}})
    folder = resolve_model_path("org/name")
    assert (folder / WEIGHTS).read_bytes() == b"{}"
    assert sorted(hub.given) == sorted(wanted)


FAULTS = [("whole", None), ("short", "part of the file"), ("elsewhere", "part of the file"), (403, "status 403"),
          (404, "hub has no"), (429, "429"), (500, "500"), (416, "part of the file")]  # fmt: skip


@pytest.mark.parametrize("fault, said", FAULTS)
def test_faults_of_a_hub_are_one_short_error(fault, said, serve, monkeypatch):
    hub = serve({"org/tiny": FILES})
    hub.faults[WEIGHTS] = fault
    if said is None:  # a server that does not know ranges: its first bytes are enough
        assert prepare("org/tiny").checkpoint.tensors
        return
    with pytest.raises(CheckpointError, match=said) as caught:
        prepare("org/tiny")
    assert len(str(caught.value)) < 500


def test_repositories_that_are_not_given_say_why(serve, monkeypatch):
    hub = serve({"org/tiny": FILES, "org/secret": FILES})
    hub.gated.add("org/secret")
    hub.moved["old/name"] = "org/tiny"
    assert prepare("old/name").checkpoint.tensors
    cases = [("org/absent", None, "no such model"), ("org/secret", None, "is gated"),
             ("org/tiny", "mian", "Nearest: main")]  # fmt: skip
    for model, revision, said in cases:
        with pytest.raises(CheckpointError, match=said) as caught:
            prepare(model, revision=revision)
        assert len(str(caught.value)) < 400


def test_offline_a_model_is_whole_or_refused(serve, monkeypatch):
    hub = serve({"org/tiny": FILES})
    prepared = prepare("org/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="not in the hub's cache, and HF_HUB_OFFLINE is set"):
        prepare("org/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    load_prepared(prepared, progress=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.given.clear()
    assert load_prepared(prepare("org/tiny"), progress=False) is not None
    assert not hub.given


# --- GGUF


def test_hub_names():
    tag, file = HubName("org/repo", "Q4_K_M"), HubName("org/repo", "a/b.gguf")
    for text in ("org/repo:Q4_K_M", "hf.co/org/repo:Q4_K_M", "https://huggingface.co/org/repo:Q4_K_M"):
        assert parse_hub_name(text) == tag
    assert parse_hub_name("org/repo/a/b.gguf") == parse_hub_name("org/repo:a/b.gguf") == file
    assert parse_hub_name("org/repo") == HubName("org/repo", None)
    assert [parse_hub_name(text) for text in ("a/b/c", "a", "a/b:", "a/b:../c", "./a/b", "")] == [None] * 6


def test_tags_in_small_letters_are_tags():
    sizes = {f"qwen2.5-7b-instruct-{tag}.gguf": 1 for tag in ("q4_k_m", "q8_0", "fp16")}
    model, several = choose_gguf("org/repo", None, sizes)
    assert (model.tag, several) == ("Q4_K_M", True)


SIZES = {"m-Q4_K_M.gguf": 1, "m-Q8_0.gguf": 2, "mmproj-F16.gguf": 3, "BF16/m-BF16-00001-of-00002.gguf": 4,
         "BF16/m-BF16-00002-of-00002.gguf": 5, "m-UD-Q4_K_XL.gguf": 6, "README.md": 7}  # fmt: skip


@pytest.mark.parametrize(
    "asked, files",
    [(None, ["m-Q4_K_M.gguf"]), ("q8_0", ["m-Q8_0.gguf"]), ("m-q8_0.gguf", ["m-Q8_0.gguf"]),
     ("bf16", [name for name in SIZES if name.startswith("BF16/")]), ("UD-Q4_K_XL", ["m-UD-Q4_K_XL.gguf"]),
     ("Q4_K_XL", ["m-UD-Q4_K_XL.gguf"])],
)  # fmt: skip
def test_a_gguf_model_goes_by_its_tag(asked, files):
    assert list(choose_gguf("org/repo", asked, SIZES)[0].files) == files


@pytest.mark.parametrize(
    "asked, said", [("Q4_K_N", "Nearest: Q4_K_M"), ("F16", "Q8_0 .0.00 GB"), ("mmproj-F16.gguf", "no GGUF")]
)
def test_an_unknown_tag_lists_those_that_there_are(asked, said):
    with pytest.raises(CheckpointError, match=said):
        choose_gguf("org/repo", asked, SIZES)


def test_only_the_gguf_file_that_is_asked_for_is_read(serve, tmp_path, capsys):
    write_model(path := tmp_path / "m.gguf", "llama")
    raw = path.read_bytes()
    header = min(info.start for info in GGUFFile.open(path).tensors.values())
    hub = serve({"org/g": {"m-Q8_0.gguf": raw, "m-F16.gguf": raw, "README.md": b"#"}})
    prepared = prepare("org/g:q8_0")
    assert header <= hub.given["m-Q8_0.gguf"] <= header * 1.1 + 512
    load_prepared(prepared, progress=False)
    assert hub.given.keys() == {"m-Q8_0.gguf"}
    assert main(["list", "--json"]) == 0
    (listed,) = json.loads(capsys.readouterr().out)["models"]
    assert (listed["id"], listed["complete"], listed["bytes"]) == ("org/g:Q8_0", True, len(raw))
    assert main(["rm", "org/g:Q8_1", "--yes"]) == 1
    assert main(["rm", "org/h", "--yes"]) == 1 and "org/g" in capsys.readouterr().err
    assert main(["rm", "org/g:q8_0", "--yes"]) == 0
    assert not prepared.checkpoint.path.exists() and "removed" in capsys.readouterr().out


def test_models_are_listed_and_removed(serve, capsys):
    serve({"org/tiny": FILES})
    assert main(["list"]) == 0 and "No models" in capsys.readouterr().err
    prepared = prepare("org/tiny")
    assert main(["list"]) == 0 and "some" in capsys.readouterr().out
    load_prepared(prepared, progress=False)
    assert main(["list"]) == 0 and "all" in capsys.readouterr().out
    assert main(["rm", "org/tiny"]) == 2 and prepared.checkpoint.path.exists()
    assert main(["rm", "org/tiny", "-y"]) == 0 and not prepared.checkpoint.path.exists()
