"""Prompts of megabytes beside a server's health, and what chat templates and foreign tokenizers cost.

python benchmarks/long_texts.py [--megabytes 3.9] [--clients 8] [--encoded]

Serves the shipped model, sends all clients' prompts at once as plain prompts and as chats, and asks /health every 10 ms
meanwhile. Then: a render of a chat by a process that is there already, the start of one, and a big tokenizer.json that
is tried in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

import pymllm
from pymllm.api import shipped_model
from pymllm.text.chat_template import RENDERER, ChatTemplate
from pymllm.text.tokenizer import Tokenizer
from pymllm.text.tokenizer_files import check_file
from tests.server.conftest import serve


def ask(url, body=None):
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return f"{error.code} {json.load(error)['error']['code']}"


def health_beside(served, path, body, clients):
    """Return what the clients were told and how long that took, and the times of /health meanwhile, in ms."""
    told, times, took = [], [], []

    def send():
        begun = time.perf_counter()
        told.append(ask(served.url + path, body))
        took.append(time.perf_counter() - begun)

    threads = [threading.Thread(target=send) for _ in range(clients)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        begun = time.perf_counter()
        ask(served.url + "/health")
        times.append(1000 * (time.perf_counter() - begun))
        time.sleep(0.01)
    return sorted(set(told)), max(took), times


def big_tokenizer(folder, size):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words, merges = list(letters), []
    for left in letters:
        for right in letters:
            words.append(left + right)
            merges.append((left, right))
    words += [f"{word}{letter}" for word in words[256:] for letter in "etaoin"][: size - len(words)]
    merges += [(word[:2], word[2]) for word in words if len(word) == 3]
    backend = Backend(models.BPE({word: index for index, word in enumerate(words)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.save(str(folder / "tokenizer.json"))
    return len(words)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=3.9)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--encoded", action="store_true", help="also without the bound: takes minutes")
    args = parser.parse_args()
    size = int(args.megabytes * 2**20)
    texts = {"words": "the cat sat on a mat " * (size // 21), "spaces": " " * size, "one letter": "a" * size}
    with serve(pymllm.LLM(progress=False)) as served:
        ask(served.url + "/v1/completions", b'{"prompt": "a", "max_tokens": 1}')
        for limit in (served.llm.tokenizer.longest_prompt, *([None] if args.encoded else [])):
            # Without the bound every text is encoded, as for tokenizers that have none.
            served.llm.tokenizer.longest_prompt = limit
            for name, text in texts.items():
                bodies = {
                    "/v1/completions": {"prompt": text, "max_tokens": 1},
                    "/v1/chat/completions": {"messages": [{"role": "user", "content": text}]},
                }
                for path, body in bodies.items():
                    # Written before: clients and server are one process here.
                    data = json.dumps(body).encode()
                    told, took, times = health_beside(served, path, data, args.clients)
                    print(
                        f"{'bounded' if limit else 'encoded'}, {name:10}, {path:20}: {told} after {took:.2f} s; "
                        f"/health median {statistics.median(times):.0f} ms, longest {max(times):.0f} ms"
                    )
    template = ChatTemplate((shipped_model() / "chat_template.jinja").read_text(), "chat_template.jinja")
    messages = [{"role": "user", "content": "Write a function."}] * 8
    RENDERER.close()
    begun = time.perf_counter()
    template.render(messages, {})
    print(f"first render, with the start of a process: {1000 * (time.perf_counter() - begun):.0f} ms")
    times = []
    for _ in range(500):
        begun = time.perf_counter()
        template.render(messages, {})
        times.append(1000 * (time.perf_counter() - begun))
    print(f"render of 8 messages: median {statistics.median(times):.2f} ms, longest {max(times):.1f} ms")
    with tempfile.TemporaryDirectory() as folder:
        size = big_tokenizer(Path(folder), 150_000)
        begun = time.perf_counter()
        check_file(Path(folder) / "tokenizer.json")
        tried = time.perf_counter() - begun
        begun = time.perf_counter()
        Tokenizer(Path(folder)).encode("a")
        print(
            f"tokenizer of {size} tokens: tried in {tried:.2f} s, loaded in {time.perf_counter() - begun:.2f} s"
        )


if __name__ == "__main__":
    main()
