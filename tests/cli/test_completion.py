"""Words that a shell completes: what is asked of Python, and the scripts in real shells, where there are such."""

from __future__ import annotations

import os
import shutil
import sys

import pytest

import pymllm
from pymllm.cli import VERBS, known_names, main
from pymllm.cli.completion import FILES, SCRIPTS, complete_line
from pymllm.kernels.registry import KERNELS, kernels_for
from pymllm.models.strategy import STRATEGIES
from pymllm.quantization.base import list_quantization_methods
from pymllm.quantization.kv_cache import KV_METHODS
from tests.processes import run


def test_the_names_kept_for_shells_are_those_of_kernels_methods_and_strategies():
    kernels = tuple(
        f"{operation}={kernel.name}" for operation in KERNELS for kernel in kernels_for(operation)
    )
    assert kernels == known_names.KERNELS
    assert set(known_names.METHODS) <= {"none", *list_quantization_methods()}
    assert set(known_names.KV_METHODS) == {"auto", *KV_METHODS}
    assert set(known_names.STRATEGIES) == set(STRATEGIES)
    rules = [f"model.layers.{i}.mlp.down_proj={name}" for i, name in enumerate(known_names.METHODS[-6:])]
    assert len(pymllm.plan(quant=rules).rules) == 6


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("pymllm ", list(VERBS)),
        ("pymllm ver", ["verify"]),
        ("pymllm -q pl", ["plan"]),
        ("pymllm --vers", ["--version"]),
        ("pymllm plan --comp", ["--compute"]),
        ("pymllm plan --compute e", ["exact"]),
        ("pymllm plan --compute=e", ["exact"]),
        ("pymllm plan -v --dtype b", ["bfloat16"]),
        ("pymllm plan --kernel linear=refe", ["reference"]),
        ("pymllm plan --quant '**.mlp.**=mxfp", ["**.mlp.**=mxfp4", "**.mlp.**=mxfp8"]),
        ("pymllm plan --quant=**.mlp.**=fp", ["fp8"]),
        ("pymllm plan --kv-cache in", ["int8"]),
        ("pymllm plan --diff ", [FILES]),
        ("pymllm plan org/b", ["org/big", FILES]),
        ("pymllm run org/big ", [FILES]),
        ("pymllm quantize --format gptq_", ["gptq_v2"]),
        ("pymllm kernels tab", ["table"] if "kernels" in VERBS else []),
        ("pymllm nonsense --", []),
        ("pymllm completion f", ["fish"]),
    ],
)
def test_words_that_may_follow(line, words, tmp_path, monkeypatch):
    (tmp_path / "models--org--big").mkdir()
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert list(complete_line("bash", line)) == words


def test_other_shells_get_the_whole_word_and_its_meaning():
    assert list(complete_line("fish", "pymllm plan --compute=ex")) == ["--compute=exact"]
    assert list(complete_line("zsh", "pymllm doc")) == [f"doctor\t{VERBS['doctor']}"]


def test_a_shell_must_be_named(capsys):
    assert main(["completion"]) == 2
    assert "bash, zsh, fish" in capsys.readouterr().err


TRIALS = {
    "bash": """eval "$(pymllm completion bash)"
COMP_WORDS=(pymllm plan --compute = e) COMP_CWORD=4 COMP_LINE="pymllm plan --compute=e" COMP_POINT=23
_pymllm && echo "${COMPREPLY[@]}"
COMP_WORDS=(pymllm plan fold) COMP_CWORD=2 COMP_LINE="pymllm plan fold" COMP_POINT=16
_pymllm && echo "${COMPREPLY[@]}"
complete -p pymllm""",
    "zsh": """autoload -Uz compinit; compinit -u -D
eval "$(pymllm completion zsh)"
_describe() { print -rl -- "${(@P)2}" }
_files() { print folder }
words=(pymllm plan --compute e) CURRENT=4; _pymllm
words=(pymllm plan fold) CURRENT=3; _pymllm
print $_comps[pymllm]""",
    "fish": """pymllm completion fish | source
complete -C "pymllm plan --compute e"
complete -C "pymllm plan fold"
complete -c pymllm""",
}


@pytest.mark.parametrize("shell", SCRIPTS)
def test_the_script_completes_in_a_real_shell(shell, tmp_path):
    found = shutil.which(shell)
    if found is None:
        pytest.skip(f"no {shell} here")
    (tmp_path / "folder").mkdir()
    command = tmp_path / "bin" / "pymllm"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m pymllm "$@"\n')
    command.chmod(0o755)
    path = os.pathsep.join([str(command.parent), os.environ["PATH"]])
    own = {"PATH": path, "HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    bare = {"zsh": ["-f"], "bash": ["--norc"], "fish": ["--no-config"]}[shell]
    result = run([found, *bare, "-c", TRIALS[shell]], cwd=tmp_path, env={**os.environ, **own})
    first, second, last = result.stdout.splitlines()[:3]
    assert first == "exact" and second.rstrip("/") == "folder" and "_pymllm" in last, result.stderr
