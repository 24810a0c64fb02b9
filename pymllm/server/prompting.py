"""Token ids of the prompts that a request brings, as its fields say: what is put around a text, and what is cut off."""

from __future__ import annotations

from pymllm.api import LLM
from pymllm.server.protocol.base import refuse
from pymllm.server.protocol.completions import CompletionRequest
from pymllm.server.protocol.sampled import SampledRequest
from pymllm.server.protocol.tokens import MAX_CHARACTERS
from pymllm.text.infill import infill


def completion_prompts(llm: LLM, request: CompletionRequest) -> list[list[int]]:
    """Encode the prompts of a completion."""
    return [_encode(llm, request, prompt) for prompt in request.prompts]


def _encode(llm: LLM, request: CompletionRequest, prompt: str | list[int]) -> list[int]:
    if not isinstance(prompt, str):
        return llm.encode(prompt)
    if request.suffix:
        prompt = infill(llm.tokenizer, prompt, request.suffix)
    kept = room(llm, request)
    if kept is None:
        llm.tokenizer.check_length(prompt)
    elif len(prompt) > MAX_CHARACTERS:
        found = f"expected at most {MAX_CHARACTERS} characters, found {len(prompt)}"
        refuse("prompt", f"is too long to be encoded and cut: {found}")
    ids = llm.tokenizer.encode(prompt, add_special_tokens=request.add_special_tokens)
    if kept is not None and kept < len(ids):
        # What the tokenizer puts before a text stays there when the text is cut, as transformers has it.
        bare = llm.tokenizer.encode(prompt, add_special_tokens=False)
        begin = len(ids) - len(bare)
        if ids[begin:] == bare and begin < kept:
            ids = ids[:begin] + bare[len(bare) - kept + begin :]
    return llm.encode(ids)


def room(llm: LLM, request: SampledRequest) -> int | None:
    """Return how many of a prompt's last tokens are read; None: all."""
    if request.truncate_prompt_tokens != -1:
        return request.truncate_prompt_tokens
    answer = 0 if request.reads_only else request.answer_length or 1
    return max(llm.engine.longest - answer, 1)


def cut(llm: LLM, request: SampledRequest, ids: list[int]) -> list[int]:
    """Leave out the beginning of a prompt that is longer than `truncate_prompt_tokens` says."""
    kept = room(llm, request)
    return ids if kept is None else ids[-kept:]
