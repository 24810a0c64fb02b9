"""Every verb: what goes to stdout, what to stderr, and the exit code."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import pymllm
from pymllm import verification
from pymllm.api import shipped_model
from pymllm.cli import VERBS, _parse, _parser, main
from pymllm.cli.plan import common_pattern
from pymllm.cli.run import DEMO_PROMPT, names_a_model
from pymllm.errors import BRIEF
from pymllm.kernels.registry import KERNELS
from tests.checkpoints import edit_config, write_checkpoint


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    """No rank of somebody's torchrun, no forced kernel path; the logger as other tests know it."""
    for name in ("RANK", "WORLD_SIZE", "PYMLLM_CPU_ISA", "PYMLLM_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    logger = logging.getLogger("pymllm")
    before = logger.level, logger.handlers, logger.propagate
    yield
    logger.level, logger.handlers, logger.propagate = before


@pytest.fixture(scope="session")
def llm() -> pymllm.LLM:
    """The shipped model."""
    return pymllm.LLM(progress=False)


@pytest.fixture(scope="session")
def awq(tmp_path_factory) -> Path:
    """A tiny AWQ checkpoint without a tokenizer."""
    folder = tmp_path_factory.mktemp("awq")
    write_checkpoint(folder, "llama", "awq-g64")
    return folder


def command(*arguments, **settings):
    """`python -m pymllm` in a process of its own."""
    environment = {**os.environ, **settings.pop("env", {})}
    words = [sys.executable, "-m", "pymllm", *arguments]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, env=environment, **settings)


def assert_one_error(code, captured, *needles):
    """Exit code 1, nothing on stdout, one paragraph on stderr."""
    assert code == 1
    assert captured.out == ""
    assert captured.err.startswith("error: ") and "Traceback" not in captured.err
    assert captured.err.count("error: ") == 1 and "\n\n" not in captured.err
    for needle in needles:
        assert needle in captured.err


# The command as such


def test_help_of_the_command_and_of_every_verb_loads_no_torch():
    code = (
        "import sys; from pymllm.cli import main\n"
        f"codes = [main([*verb, '--help']) for verb in ([], *([verb] for verb in {list(VERBS)}))]\n"
        "assert codes == [0] * len(codes), codes\n"
        "heavy = {'torch', 'transformers', 'rich', 'fastapi', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert all(verb in result.stdout for verb in VERBS)


def test_the_command_alone_gives_its_help_and_an_unknown_argument_the_usage_of_the_verb(capsys):
    assert main([]) == 2
    assert "first steps:" in capsys.readouterr().err
    assert main(["plan", "model", "another"]) == 2
    assert capsys.readouterr().err.startswith("usage: pymllm plan [MODEL] [options]\n")


@pytest.mark.parametrize("verb", VERBS)
def test_help_fits_a_narrow_terminal_and_its_examples_are_understood(verb, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    head, _, examples = text.partition("\nexamples:\n")
    assert [line for line in head.splitlines() if len(line) > 80] == []
    parser = _parser([verb])
    for line in examples.splitlines():
        example = re.split(r" {2,}|[<>]", line.strip())[0]
        if example.startswith("pymllm "):
            assert _parse(parser, shlex.split(example)[1:]).verb == verb


def test_the_version_is_told(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"pymllm {pymllm.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["plan", "--kernel", "reference"],
        ["plan", "--tensor-parallel-size", "0"],
        ["plan", "one", "two"],
        ["plan", "--compute", "fast"],
        ["plan", "--js"],  # no abbreviations: a later option must not change what a script means
        ["verify", "--top", "0"],
        ["run", "model", "prompt", "more"],
        ["run", "model", "--chat", "prompt", "more"],
        ["run", "model", "prompt", "--jsn"],
        ["run", "model", "prompt", "--prompt", "another"],
        ["run", "--max-tokens", "few"],
        ["run", "\udcff"],
        ["serve", "--port", "70000"],
        ["serve", "--api-key", ""],
    ],
)
def test_wrong_usage_is_2_and_names_the_verb(arguments, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("usage: pymllm")


@pytest.mark.parametrize(
    ("arguments", "needle"),
    [
        (["plan", "/no/such/folder"], "/no/such/folder"),
        (["plan", "not a model"], "neither a local folder nor a hub id"),
        (["plan", "--quant", "**.mpl.**=fp8"], "matches no layer"),
        (["plan", "--quant", "**.mlp.**=fp88"], "fp88"),
        (["plan", "--quant", "nonsense"], "PATTERN=METHOD"),
        (["plan", "--quant-file", "/no/such/file"], "/no/such/file"),
        (["plan", "--kernel", "linear=warp"], "warp"),
        (["plan", "--kernel", "convolution=fast"], "convolution"),
        (["plan", "--dtype", "float8"], "float8"),
        (["plan", "--device", "tpu"], "tpu"),
        (["plan", "--tensor-parallel-size", "3"], "1, 2, 4"),
        (["plan", "--rank", "1"], "rank"),
        (["plan", "--revision", "main"], "revision"),
        (["verify", "/no/such/folder"], "/no/such/folder"),
        (["run", "/no/such/folder", "prompt"], "/no/such/folder"),
        (["run", "x", "--temperature", "-1"], "temperature"),
        (["run", "x", "--tensor-parallel-size", "2"], "torchrun"),
        (["run", "word " * 2000], "prompt"),
        (["serve", "/no/such/folder", "--port", "0"], "/no/such/folder"),
        (["serve", "--tensor-parallel-size", "2"], "one rank"),
        (["serve", "--host", "256.256.256.256"], "256.256.256.256"),
    ],
)
def test_what_cannot_be_done_is_one_paragraph_and_1(arguments, needle, capsys):
    assert_one_error(main(arguments), capsys.readouterr(), needle)


def test_a_long_list_of_problems_is_cut_unless_all_of_it_is_asked_for(tmp_path, capsys):
    write_checkpoint(tmp_path, "llama", num_hidden_layers=2)
    edit_config(tmp_path, num_hidden_layers=1)  # the tensors of the other layer have no place
    assert_one_error(
        main(["plan", str(tmp_path)]), capsys.readouterr(), "and 1 more. --verbose lists all of them."
    )
    for option in ("--verbose", "--json"):
        assert main(["plan", str(tmp_path), option]) == 1
        text = capsys.readouterr().err
        assert "more" not in text and text.count("model.layers.1.") == 9 > BRIEF


def test_a_kernel_path_that_does_not_exist_is_an_error_like_any_other(monkeypatch, capsys):
    monkeypatch.setenv("PYMLLM_CPU_ISA", "abacus")
    assert_one_error(main(["plan"]), capsys.readouterr(), "PYMLLM_CPU_ISA=abacus")


def test_ctrl_c_is_130(monkeypatch, capsys):
    def interrupted(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr("pymllm.planning.plan", interrupted)
    assert main(["plan"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_error(awq):
    words = f"{sys.executable} -m pymllm plan {awq} --json"
    script = f"set -o pipefail; {words} | true; echo code ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120)
    assert result.stdout == "code 141\n"  # as `yes | true` ends, too
    assert result.stderr == ""


@pytest.mark.parametrize("verb", ("plan", "doctor"))
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line_and_1(awq, verb):
    command = [sys.executable, "-m", "pymllm", verb] + ([str(awq)] if verb == "plan" else [])
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: the output cannot be written: No space left on device.\n"


def test_a_closed_stdout_is_no_error(awq):
    shell = f'"{sys.executable}" -m pymllm plan "{awq}" >&-'
    done = subprocess.run(shell, shell=True, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_verbose_logs_a_line_for_the_load(awq, capsys):
    assert main(["verify", str(awq), "--verbose"]) == 0
    assert re.search(r"^\d\d:\d\d:\d\d INFO loaded .* MB .* s .*awq", capsys.readouterr().err, re.MULTILINE)
    assert main(["verify", str(awq)]) == 0
    assert "INFO" not in capsys.readouterr().err


def test_ranks_above_0_print_nothing_but_their_errors(awq, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert main(["plan", str(awq)]) == 0
    assert capsys.readouterr() == ("", "")
    assert main(["plan", "/no/such/folder"]) == 1
    assert capsys.readouterr().err.startswith("error (rank 1): ")


# plan


def test_plan_json_is_the_plan(awq, capsys):
    rules = ["**.mlp.**=fp8", "lm_head=none"]
    assert main(["plan", str(awq), "--quant", rules[0], "--quant", rules[1], "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == pymllm.plan(str(awq), rules).to_dict()
    assert {layer["rule"] for layer in printed["layers"] if ".mlp." in layer["prefix"]} == {rules[0]}


def test_rules_of_a_file_and_of_options_keep_their_order(awq, tmp_path, capsys):
    (tmp_path / "rules").write_text("# all\n**.layers.**=fp8\n")
    for first in (True, False):
        options = [["--quant", "**.mlp.**=none"], ["--quant-file", str(tmp_path / "rules")]]
        words = [word for option in (options if first else options[::-1]) for word in option]
        code = main(["plan", str(awq), *words, "--json"])
        captured = capsys.readouterr()
        if first:
            layers = json.loads(captured.out)["layers"]
            methods = {layer["method"] for layer in layers if ".mlp." in layer["prefix"]}
            assert code == 0 and methods == {"none"}
        else:
            assert_one_error(code, captured, "never applies")


def test_plan_shows_the_share_of_a_rank(awq, capsys):
    assert main(["plan", str(awq), "--tensor-parallel-size", "2", "--rank", "1", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["tensor_parallel"]["rank"], plan["tensor_parallel"]["size"]) == (1, 2)
    layer = next(layer for layer in plan["layers"] if layer["prefix"].endswith("0.mlp.gate_proj"))
    assert layer["shape_local"] == [layer["shape"][0] // 2, layer["shape"][1]]


def test_plan_prints_groups_or_all_layers(awq, capsys):
    assert main(["plan", str(awq), "--quant", "**.mlp.**=fp8"]) == 0
    text = capsys.readouterr().out
    for needle in (
        "awq int4 g64",
        "rule **.mlp.**=fp8",
        "model.layers.*.mlp.*",
        "more refusals",
        "KV cache",
    ):
        assert needle in text
    assert main(["plan", str(awq), "--all"]) == 0
    text = capsys.readouterr().out
    for layer in pymllm.plan(str(awq)).layers:
        assert layer.prefix in text


def test_plan_names_the_refusals_that_a_user_can_change_and_all_of_them_with_why(awq, capsys):
    arguments = ["plan", str(awq), "--device", "cuda:sm90", "--dtype", "float32", "--quant", "**.mlp.**=fp8"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    lines = [line for line in text.splitlines() if line.startswith("not chosen")]
    assert len(lines) == 2 and all(line.endswith("dtype=bfloat16 would allow it") for line in lines)
    assert "triton_fp8_w8a8 (6 x linear), torch_scaled_mm (6 x linear): quantises activations" in lines[0]
    assert "triton_fp8 (6 x linear), triton_int (8 x linear): multiplies float16 or bfloat16" in lines[1]
    planned = pymllm.plan(str(awq), {"**.mlp.**": "fp8"}, device="cuda:sm90", dtype="float32")
    refused = {(r["kernel"], r["why"], r["cause"]) for layer in planned.layers for r in layer.refused}
    kinds = {(layer.kind, r["kernel"], r["why"]) for layer in planned.layers for r in layer.refused}
    assert f"{len(kinds) - 4} more refusals, " in text  # four are named in the two lines
    assert "reference (linear) computes with: weights dequantised exactly" in text
    assert main([*arguments, "--why"]) == 0
    lines = " ".join(capsys.readouterr().out.split()).split("not chosen")[1:]
    for kernel, why, cause in refused:
        assert any(kernel in line and (why in line or cause == "device") for line in lines), (kernel, why)
    assert sum("for other devices" in line for line in lines) == 1


def test_plan_says_what_to_install_once(awq):
    script = (
        "import sys; sys.modules['pymllm._native'] = None\nfrom pymllm.cli import main\nmain(sys.argv[1:])"
    )
    words = [sys.executable, "-c", script, "plan", str(awq)]
    text = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True).stdout
    assert text.count("the native CPU kernels are not built") == 1
    assert "native_int4 (14 x linear), native (2 x attention): the native CPU kernels" in text


def test_names_are_covered_by_the_narrowest_pattern():
    assert common_pattern(["model.layers.3.mlp.up_proj"]) == "model.layers.3.mlp.up_proj"
    assert common_pattern(["a.0.x", "a.1.x"]) == "a.*.x"
    assert common_pattern(["a.0.m.x", "a.1.m.y"]) == "a.*.m.*"
    assert common_pattern(["a.0.m.x", "a.1.n.y"]) == "a.*.**"


# verify


def test_verify_passes_and_prints_the_worst_first(awq, capsys):
    assert main(["verify", str(awq), "--top", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5  # a head, three layers, the verdict
    assert main(["verify", str(awq), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    assert report["layers"][0]["prefix"] in lines[1]
    assert [layer["worst"] for layer in report["layers"]] == sorted(
        (layer["worst"] for layer in report["layers"]), reverse=True
    )


def test_verify_fails_with_1_and_strict_json(monkeypatch, capsys):
    bad = verification.LayerCheck(
        prefix="model.layers.0.mlp.up_proj",
        kind="linear",
        method="fp8",
        kernel="broken",
        numerics="none",
        errors={"ordinary": float("nan"), "large": 3.0},
        tolerance=1e-5,
        packed_exact=True,
        quantisation_error=0.0,
    )
    monkeypatch.setattr("pymllm.verification.verify", lambda *a, **k: verification.Verification("m", [bad]))
    assert main(["verify"]) == 1
    assert "FAIL" in capsys.readouterr().out
    assert main(["verify", "--json"]) == 1
    text = capsys.readouterr().out
    assert "NaN" not in text and "Infinity" not in text
    assert json.loads(text)["layers"][0]["worst"] is None


# run


def test_run_prints_the_answer_and_nothing_else(llm, capsys):
    assert main(["run", "import os\n", "--max-tokens", "12", "--temperature", "0"]) == 0
    expected = llm.generate("import os\n", llm.default_params(max_tokens=12, temperature=0.0))[0].text
    captured = capsys.readouterr()
    assert captured.out == expected + "\n"
    assert captured.err == ""


def test_run_stats_go_to_stderr_the_plan_first(capsys):
    assert main(["run", "--stats", "import os\n", "--max-tokens", "4", "--seed", "1"]) == 0
    captured = capsys.readouterr()
    for needle in ("awq int4", "KV cache", "load ", "first ", "prefill ", "decode "):
        assert needle in captured.err and needle not in captured.out
    assert captured.err.index("KV cache") < captured.err.index("import os") < captured.err.index("decode ")


def test_run_json_is_one_object(llm, capsys):
    words = ["run", "import os\n", "--max-tokens", "6", "--seed", "3", "--stop", "zzz", "--json", "--stats"]
    assert main(words) == 0
    captured = capsys.readouterr()
    answer = json.loads(captured.out)
    expected = llm.generate("import os\n", llm.default_params(max_tokens=6, seed=3, stop=("zzz",)))[0]
    assert answer["text"] == expected.text
    assert answer["token_ids"] == list(expected.token_ids)
    assert answer["finish_reason"] == expected.finish_reason
    assert answer["prompt_tokens"] == len(expected.prompt_token_ids)
    assert answer["sampling"]["repetition_penalty"] == llm.generation_config["repetition_penalty"]
    assert answer["plan"]["weight_bytes"] == llm.plan.totals["weight_bytes"]
    assert answer["speeds"]["decode_tokens_per_second"] > 0


def test_run_reads_its_prompt_from_a_pipe(llm, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("# für\n".encode()), "ascii"))
    assert main(["run", "--max-tokens", "4", "--temperature", "0", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["prompt_tokens"] == len(llm.encode("# für\n"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    assert main(["run"]) == 2
    assert "UTF-8" in capsys.readouterr().err


def test_run_without_a_prompt_has_one_for_the_shipped_model_alone(llm, monkeypatch, capsys):
    for arguments in ([], ["--demo"]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
        assert main(["run", "--max-tokens", "2", "--json", *arguments]) == 0
        assert json.loads(capsys.readouterr().out)["prompt_tokens"] == len(llm.encode(DEMO_PROMPT))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert main(["run", str(shipped_model())]) == 2
    assert "no prompt" in capsys.readouterr().err


def test_run_chats_through_the_template(llm, capsys):
    assert main(["run", "--chat", "Hello", "--max-tokens", "3", "--json"]) == 0
    ids = llm.tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}])
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] == len(ids)


@pytest.mark.parametrize(
    ("word", "is_model"),
    [
        ("def f(x):", False),
        ("hello", False),
        ("a/b c", False),
        ("/ is a slash", False),
        ("x" * 5000, False),
        ("org/name", True),
        ("Qwen/Qwen3-0.6B", True),
        ("./missing", True),
        ("/missing/folder", True),
        ("~/models", True),
        (str(shipped_model()), True),
    ],
)
def test_a_lone_word_is_a_model_or_a_prompt(word, is_model):
    assert names_a_model(word) == is_model


def test_run_takes_model_and_prompt_in_every_form(llm, capsys):
    folder, prompt = str(shipped_model()), "a/b"
    ids = len(llm.encode(prompt))
    forms = [folder, prompt], [folder, "--prompt", prompt], ["--prompt", prompt]
    for words in (*forms, [folder, "--seed", "1", prompt], ["--seed", "1", folder, prompt]):
        assert main(["run", *words, "--max-tokens", "1", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["prompt_tokens"] == ids


def test_run_without_a_tokenizer_says_what_is_missing(awq, capsys):
    assert_one_error(main(["run", str(awq), "hello"]), capsys.readouterr(), "tokenizer.json")


def test_run_forces_kernels_and_converts_by_rules(capsys):
    words = ["--quant", "**.mlp.**=fp8", "--kernel", "linear=reference", "--max-tokens", "2", "--json"]
    assert main(["run", "x = ", *words]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert plan["kernels"]["linear: reference"] > 1
    assert any("fp8" in method for method in plan["methods"])


@pytest.mark.slow
def test_two_ranks_give_the_text_of_one_once(llm):
    words = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "-m",
        "pymllm",
        "run",
        "--json",
        "import os\n",
    ]
    words += ["--max-tokens", "8", "--temperature", "0", "--tensor-parallel-size", "2"]
    result = subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    expected = llm.generate("import os\n", llm.default_params(max_tokens=8, temperature=0.0))[0]
    assert json.loads(result.stdout)["text"] == expected.text


# doctor


def test_doctor_tells_versions_cpu_formats_kernels_and_extras(capsys):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["schema_version"] == 1 and report["problems"] == []
    assert report["versions"]["pymllm"] == pymllm.__version__
    assert report["cpu"]["best_path"] in report["cpu"]["runnable_paths"]
    assert report["cpu"]["native_kernels"]["present"] or report["cpu"]["native_kernels"]["missing_reason"]
    assert {"awq", "fp8", "none"} <= set(report["formats"])
    assert set(report["kernels"]) == set(KERNELS)
    assert all(
        names[-1] in ("reference", "torch") for names in report["kernels"].values()
    )  # these refuse nothing
    for operation, names in report["kernels_for_other_devices"].items():
        assert set(names) < set(report["kernels"][operation])
    assert ("triton_int" in report["kernels_for_other_devices"]["linear"]) == (report["gpus"] == [])
    assert set(report["extras"]) == {"triton", "flashinfer", "server", "plot", "writers"}
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("awq", "reference", "server", report["cpu"]["best_path"]))


def test_doctor_reports_a_wrong_setting_and_fails(monkeypatch, capsys):
    monkeypatch.setenv("PYMLLM_CPU_ISA", "abacus")
    assert main(["doctor"]) == 1
    assert "abacus" in capsys.readouterr().out


def test_the_extras_that_doctor_knows_are_those_of_pyproject():
    from pymllm.cli.doctor import EXTRAS

    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    section = text.split("[project.optional-dependencies]")[1].split("\n[")[0]
    declared = dict(re.findall(r"^(\w+) = \[(.*)\]", section, re.MULTILINE))
    for name, extra in EXTRAS.items():
        assert re.findall(r'"([\w-]+)', declared[name]) == [pip for _, pip in extra.packages]


# `python -m pymllm`, as a user starts it


def test_the_module_runs_as_the_command():
    result = command("plan", "/no/such/folder")
    assert result.returncode == 1
    assert result.stdout == "" and result.stderr.startswith("error: ") and "Traceback" not in result.stderr


# What the documents say


def test_the_plan_schema_page_has_every_key_and_no_other(awq):
    plan = pymllm.plan(str(awq)).to_dict()
    text = (Path(__file__).parents[2] / "docs" / "plan-schema.md").read_text()
    sections = dict(
        re.findall(r"^## `?([\w ]+)(?:\[\])?`?\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    )
    tables = {title: re.findall(r"^\| `(\w+)` \|", body, re.MULTILINE) for title, body in sections.items()}
    assert tables["The plan"] == list(plan)
    assert tables["layers"] == list(plan["layers"][0])
    for key in ("tensor_parallel", "totals"):
        assert tables[key] == list(plan[key])
