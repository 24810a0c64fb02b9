"""Score questions.jsonl without a server, in two ways: by `LLM.score`, and by transformers in float32.

Run by the Python of the server: python tests/clients/offline_scores.py QUESTIONS. Prints a JSON object with two lists,
`ours` and `formula`; each has, for every question, the log-likelihood of each choice. For the second the weights are
read by the numpy of tests/shipped_model/, which shares nothing with pymllm.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.numpy import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import pymllm
from tests.shipped_model.test_shipped_model import FOLDER, dequantized_state, linear_shapes


def formula_model() -> LlamaForCausalLM:
    settings = json.loads((FOLDER / "config.json").read_text())
    tensors = load_file(FOLDER / "model.safetensors")
    others = ("quantization_config", "dtype", "torch_dtype")
    config = LlamaConfig(**{name: value for name, value in settings.items() if name not in others})
    model = LlamaForCausalLM(config).float().eval()
    model.load_state_dict(dequantized_state(tensors, linear_shapes(settings)))
    return model


@torch.no_grad()
def formula(model, tokenizer, context: str, choice: str) -> float:
    """Add up the log-probabilities of the choice's tokens after the context's.

    White space at the end of a context counts as the choice's: it is a part of the token that follows.
    """
    bare = context.rstrip()
    before, whole = (tokenizer.encode(text, add_special_tokens=False) for text in (bare, context + choice))
    logprobs = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
    return sum(logprobs[place - 1, whole[place]].item() for place in range(len(before), len(whole)))


def main(file: str) -> None:
    questions = [json.loads(line) for line in Path(file).read_text().splitlines()]
    llm = pymllm.LLM(progress=False, dtype="float32")
    model, tokenizer = formula_model(), AutoTokenizer.from_pretrained(FOLDER)
    ours, other = [], []
    for one in questions:
        context, choices = one["context"], one["choices"]
        ours.append([sum(score.logprobs) for score in llm.score(context, choices)])
        other.append([formula(model, tokenizer, context, choice) for choice in choices])
    print(json.dumps({"ours": ours, "formula": other}))


if __name__ == "__main__":
    main(sys.argv[1])
