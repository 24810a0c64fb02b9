"""`llm`, the command, with a file that names the server: extra-openai-models.yaml, as its manual says."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from asked import LONG, QUESTION, Weather


@pytest.fixture
def llm(server, tmp_path):
    entry = (
        f"- model_id: ours\n  model_name: {server.model}\n  api_base: {server.url}\n"
        f"  api_key_name: ours\n  supports_tools: true\n  supports_schema: true\n"
    )
    completion = (
        f"- model_id: text\n  model_name: {server.model}\n  api_base: {server.url}\n"
        f"  api_key_name: ours\n  completion: true\n"
    )
    (tmp_path / "extra-openai-models.yaml").write_text(entry + completion)
    (tmp_path / "keys.json").write_text(json.dumps({"ours": server.key}))

    def run(*arguments, model="ours"):
        command = [sys.executable, "-m", "llm", "prompt", "-m", model, *arguments]
        environment = {**os.environ, "LLM_USER_PATH": str(tmp_path)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_prompts_whole_and_streamed_say_the_same(llm):
    settings = (QUESTION, "-o", "temperature", "0", "-o", "max_tokens", "24")
    whole = llm(*settings, "--no-stream")
    assert whole.strip() and llm(*settings) == whole
    assert llm("def f(", "-o", "max_tokens", "4", model="text").strip()


@pytest.mark.parametrize("stream", [(), ("--no-stream",)], ids=["stream", "whole"])
def test_an_answer_follows_a_schema(llm, stream):
    schema = json.dumps(Weather.model_json_schema())
    assert Weather.model_validate_json(
        llm(QUESTION, "--schema", schema, "-o", "max_tokens", str(LONG), *stream)
    )


def test_tools_may_be_offered(llm):
    """The command leaves the choice to the model, which knows of no tools and answers with text."""
    assert llm(QUESTION, "-T", "llm_version", "-o", "temperature", "0", "-o", "max_tokens", "24").strip()
