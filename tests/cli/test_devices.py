"""--device of the verbs: one of several GPUs by its number, and its name where a verb says what runs where."""

import json

import pytest

from pymllm.cli import main

from ..fake_gpus import FakeGPUs


def test_doctor_numbers_the_gpus_and_says_which_one_is_meant(monkeypatch, capsys):
    gpus = FakeGPUs(monkeypatch, 2, memory=80 * 10**9)
    gpus.free = [79 * 10**9, 8 * 10**9]
    gpus.reserved[1] = 10**9
    assert main(["doctor", "--json", "--device", "cuda:1"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [(gpu["device"], gpu["free_bytes"]) for gpu in report["gpus"]] == [
        ("cuda:0", 79 * 10**9),
        ("cuda:1", 9 * 10**9),
    ]
    assert report["device"] == {"asked": "cuda:1", "device": "cuda:1", "name": "Fake A100 number 1"}
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "gpu        cuda:1: Fake A100 number 1, capability 8.0, 9.0 of 80.0 GB free" in said
    assert "device     auto is cuda:1: Fake A100 number 1" in said


def test_doctor_lists_a_gpu_that_is_too_full_to_be_asked(monkeypatch, capsys):
    gpus = FakeGPUs(monkeypatch, 1)
    gpus.free = []
    monkeypatch.setattr(
        "torch.cuda.mem_get_info", lambda device: (_ for _ in ()).throw(RuntimeError("out of memory"))
    )
    assert main(["doctor"]) == 0
    assert "none of 85.9 GB free" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("cuda:2", "cuda:2; 2 GPUs, cuda:0 to cuda:1"),
        ("cuda:sm90", "cuda:sm90 can be planned for, but not run on"),
        ("cuda:01", "cuda:1"),
    ],
)
def test_doctor_fails_for_a_device_that_cannot_be_used(monkeypatch, capsys, device, words):
    FakeGPUs(monkeypatch, 2)
    assert main(["doctor", "--device", device]) == 1
    problems = [line for line in capsys.readouterr().out.splitlines() if line.startswith("PROBLEM")]
    assert len(problems) == 1 and words in problems[0]


@pytest.mark.parametrize(
    "arguments",
    (
        ["plan"],
        ["run", "a prompt"],
        ["verify"],
        ["bench"],
        ["kernels", "tune"],
        ["chat"],
        ["serve", "--port", "0"],
    ),
)
def test_every_verb_takes_a_gpu_by_its_number_and_says_how_many_there_are(monkeypatch, capsys, arguments):
    FakeGPUs(monkeypatch, 2)
    assert main([*arguments, "--device", "cuda:7"]) == 1
    assert "cuda:7; 2 GPUs, cuda:0 to cuda:1" in capsys.readouterr().err


def test_a_plan_names_the_gpu_that_it_is_for(monkeypatch, capsys):
    FakeGPUs(monkeypatch, 2)
    assert main(["plan", "--device", "cuda:1", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert (planned["device"], planned["device_name"]) == ("cuda:1", "Fake A100 number 1")
    assert main(["plan", "--device", "cuda:1"]) == 0
    assert "on cuda:1 (Fake A100 number 1)" in capsys.readouterr().out


@pytest.mark.parametrize("device", ("cpu", "cuda:sm90"))
def test_tiles_are_measured_on_a_gpu_that_is_here_alone(monkeypatch, capsys, device):
    FakeGPUs(monkeypatch, 2)
    assert main(["kernels", "tune", "--device", device]) == 1
    assert "tiles are measured on a GPU that is here" in capsys.readouterr().err


@pytest.mark.parametrize("tokens", ("0", "192", "4096"))
def test_rows_that_have_no_tile_are_refused_before_any_is_tuned(monkeypatch, capsys, tokens):
    FakeGPUs(monkeypatch, 1)
    assert main(["kernels", "tune", "--tokens", "1", tokens]) == 1
    said = capsys.readouterr().err
    assert "--tokens from 1 to 191" in said and tokens in said


def test_tiles_are_measured_on_the_gpu_that_is_named_and_kept_for_it(monkeypatch, capsys, tmp_path):
    from pymllm.kernels.triton import tune
    from pymllm.kernels.triton.tuning import Tile

    gpus, seen = FakeGPUs(monkeypatch, 2), []

    def measure(kernel, example, outputs, inputs, tokens, device, *, where, keep, **limits):
        seen.append((gpus.current, str(where), device.name))
        found = tune.Tuned(f"{kernel.name} {outputs}x{inputs}", Tile(64, 16, 64), {Tile(32, 16, 64): 1e-5})
        keep(found.key, found.best)
        return found

    monkeypatch.setattr(tune, "tune", measure)
    out = tmp_path / "tiles.json"
    arguments = ["--device", "cuda:1", "--shape", "64x64", "--tokens", "1", "--out", str(out)]
    assert main(["kernels", "tune", *arguments]) == 0
    assert set(seen) == {(1, "cuda:1", "Fake A100 number 1")} and gpus.current == 0
    assert json.loads(out.read_text())["device"] == "Fake A100 number 1"
    assert "on Fake A100 number 1 (cuda:1)" in capsys.readouterr().out


def test_ray_chooses_the_gpus_of_its_replicas(capsys):
    assert main(["serve", "--ray", "--device", "cuda:1"]) == 2
    assert "Ray chooses the GPUs" in capsys.readouterr().err
