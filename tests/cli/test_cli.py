"""The command as such, and doctor: what goes to stdout, what to stderr, and the exit code."""

from __future__ import annotations

import io
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

import pymllm
from pymllm.cli import EXIT_CODES, VERBS, _parse, _parser, main, output, whole_parser
from pymllm.cli.usage import called_within, options_of, parsers_within
from pymllm.errors import BRIEF
from pymllm.kernels.registry import KERNELS
from pymllm.loading import progress
from tests.checkpoints import edit_config, write_checkpoint
from tests.cli.commands import assert_one_error
from tests.processes import python, run


def test_help_of_the_command_and_of_every_verb_loads_no_torch():
    code = (
        "import sys; from pymllm.cli import main\n"
        f"codes = [main([*verb, '--help']) for verb in ([], *([verb] for verb in {list(VERBS)}))]\n"
        "assert codes == [0] * len(codes), codes\n"
        "heavy = {'torch', 'transformers', 'rich', 'fastapi', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = python("-c", code, check=True)
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
    out = capsys.readouterr().out
    assert (
        re.fullmatch(r"pymllm (\S+) \(Python 3\S+, torch \S+, (no )?native kernels\)\n", out)[1]
        == pymllm.__version__
    )


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
    if arguments:
        _, error, where = captured.err.splitlines()
        assert "error: " in error and "--help" in where and ".." not in error


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("rn", "there is no verb 'rn'. Nearest: run."),
        ("org/name hello", "A model's answer: pymllm run MODEL."),
        ("run --qaunt x", "there is no option --qaunt. Nearest: --quant, "),
        ("run --max-tok 3", "Nearest: --max-tokens."),
        ("run --compute exct", "expected auto or exact or checkpoint, not 'exct'. Nearest: exact."),
        ("plan --host x", "--host is an option of serve."),
        ("plan --frobnicate", "there is no option --frobnicate."),
        ("plan --json=yes", "--json: takes no value, not 'yes'"),
        ("plan one two", "there is no place for 'two' behind [MODEL]."),
        ("--verson", "there is no option --verson. Nearest: --version"),
    ],
)
def test_a_wrong_word_gets_the_nearest_one(line, hint, capsys):
    assert main(line.split()) == 2
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_takes_verbose_and_quiet_before_and_behind_it(verb):
    within = parsers_within(parsers_within(whole_parser())[verb])
    behind = [verb, *list(within)[:1]]
    known = {action.dest for action in options_of(called_within(whole_parser(), behind))}
    assert {"verbose", "quiet"} <= known
    for name, flag in (("quiet", "-q"), ("verbose", "-v")):
        assert getattr(_parser([]).parse_args([flag, "completion"]), name)
    assert not _parser([]).parse_args(["completion"]).quiet


def test_quiet_says_nothing_but_what_matters(awq, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert main(["-q", "verify", str(awq)]) == 0
    assert progress.hidden and capsys.readouterr().err == ""
    output.say("a note")
    output.warn("what matters")
    assert capsys.readouterr().err == "what matters\n"
    assert main(["plan", "/no/such/folder", "-q"]) == 1
    assert capsys.readouterr().err.startswith("error: ")
    output.start_output(False)
    assert not progress.hidden


@pytest.mark.parametrize(
    ("settings", "terminal", "styled"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"NO_COLOR": "1"}, True, False),
        ({"NO_COLOR": ""}, True, True),
        ({"CLICOLOR": "0"}, True, False),
        ({"TERM": "dumb"}, True, False),
        ({"FORCE_COLOR": "1"}, False, True),
        ({"CLICOLOR_FORCE": "1", "CLICOLOR": "0"}, False, True),
        ({"FORCE_COLOR": "0"}, False, False),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, True, False),
    ],
)
def test_colours_are_as_the_environment_asks(settings, terminal, styled, monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "CLICOLOR", "CLICOLOR_FORCE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm-256color", "COLORTERM": "", **settings}.items():
        monkeypatch.setenv(name, value)
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stdout", stream)
    output.console().print("text", style="bold red")
    assert ("\x1b" in stream.getvalue()) == styled and "text" in stream.getvalue()
    assert output.has_styles(stream) == styled
    assert progress.shows_bars() is False


def test_the_help_has_the_exit_codes(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(
        re.search(rf"^  {code} +{re.escape(meaning)}$", text, re.M) for code, meaning in EXIT_CODES.items()
    )


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
        (["plan", "--device", "gpu"], "A GPU is called cuda here."),
        (["plan", "--tensor-parallel-size", "3"], "1, 2, 4"),
        (["plan", "--rank", "1"], "rank"),
        (["plan", "--revision", "main"], "revision"),
        (["verify", "/no/such/folder"], "/no/such/folder"),
        (["run", "/no/such/folder", "prompt"], "/no/such/folder"),
        (["run", "x", "--temperature", "-1"], "temperature"),
        (["verify", "--tensor-parallel-size", "2"], "torchrun"),
        (["run", "word " * 2000], "prompt"),
        (["serve", "/no/such/folder", "--port", "0"], "/no/such/folder"),
        (["serve", "--tensor-parallel-size", "3", "--nnodes", "2"], "shared evenly"),
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

    monkeypatch.setattr("pymllm.planning.make_plan.plan", interrupted)
    assert main(["plan"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_error(awq):
    words = f"{sys.executable} -m pymllm plan {awq} --json"
    script = f"set -o pipefail; {words} | true; echo code ${{PIPESTATUS[0]}}"
    result = run(["bash", "-c", script])
    assert result.stdout == "code 141\n"  # as `yes | true` ends, too
    assert result.stderr == ""


@pytest.mark.parametrize("verb", ("plan", "doctor"))
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line_and_1(awq, verb):
    command = [sys.executable, "-m", "pymllm", verb] + ([str(awq)] if verb == "plan" else [])
    with open("/dev/full", "w") as full:
        done = run(command, stdout=full)
    assert done.returncode == 1
    assert done.stderr == "error: the output cannot be written: No space left on device.\n"


def test_a_closed_stdout_is_no_error(awq):
    done = run(["sh", "-c", f'"{sys.executable}" -m pymllm plan "{awq}" >&-'])
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


# `python -m pymllm`, as a user starts it


def test_the_module_runs_as_the_command():
    result = python("-m", "pymllm", "plan", "/no/such/folder")
    assert result.returncode == 1
    assert result.stdout == "" and result.stderr.startswith("error: ") and "Traceback" not in result.stderr


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


def test_ctrl_c_while_the_command_line_is_imported_ends_it_in_silence(monkeypatch, capsys):
    from pymllm.__main__ import main as start

    def interrupted(name, *given, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.__import__", interrupted)
    code = start()
    monkeypatch.undo()
    assert code == 130 and capsys.readouterr().err == ""
