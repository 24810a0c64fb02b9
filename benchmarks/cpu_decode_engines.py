"""The engines of cpu_decode.py, each in a process of its own, which answers each line of JSON with another.

    python benchmarks/cpu_decode_engines.py ENGINE MODELS THREADS

{"batch": B, "steps": N} → the seconds to read B prompts, and to decode N tokens of each after the first.
{"logits": true} → the logits after one fixed prompt, so that the engines can be seen to run the same model.
"""

# B batch, P prompt length

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from cpu_decode_models import CONFIG, model_folder

PROMPT = 128
MOST_STEPS = 256
VOCABULARY = CONFIG["vocab_size"]


class Engine(Protocol):
    packages: tuple[str, ...]

    def generate(self, prompts: np.ndarray, steps: int) -> tuple[float, float]:
        """Generate for prompts [B, P] of ids.  Returns the seconds up to the first token of each, and from there on."""

    def logits(self, prompt: np.ndarray) -> np.ndarray:
        """Run a prompt [P] of ids.  Returns the logits [V] after it."""


class Pymllm:
    """`pymllm.LLM`, greedy, so that every step ends with a look at the logits, as in the other engines."""

    packages: tuple[str, ...] = ("torch",)
    kind, quant = "awq", {"model.embed_tokens": "awq", "lm_head": "awq"}

    def __init__(self, models: Path, threads: int) -> None:
        import torch

        from pymllm import LLM

        torch.set_num_threads(threads)
        folder = model_folder(models, self.kind)
        # Prompts come again, and reading them is what is timed.
        self.llm = LLM(folder, self.quant, device="cpu", dtype="bfloat16", prefix_reuse=False)

    def generate(self, prompts: np.ndarray, steps: int) -> tuple[float, float]:
        from pymllm import SamplingParams

        params = SamplingParams(max_tokens=steps + 1, ignore_eos=True)
        start, first, seen = time.perf_counter(), 0.0, set()
        for index, _ in self.llm.stream_all(prompts.tolist(), params):
            seen.add(index)
            if not first and len(seen) == len(prompts):
                first = time.perf_counter()
        return first - start, time.perf_counter() - first

    def logits(self, prompt: np.ndarray) -> np.ndarray:
        return self.llm.logits(prompt.tolist())[-1].numpy()


class PymllmFloat(Pymllm):
    kind, quant = "float", None


class Transformers:
    packages: tuple[str, ...] = ("transformers", "torch")
    dtype = "float32"

    def __init__(self, models: Path, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        folder = model_folder(models, "float")
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, self.dtype)).eval()

    def generate(self, prompts: np.ndarray, steps: int) -> tuple[float, float]:
        import torch

        with torch.inference_mode():
            start = time.perf_counter()
            out = self.model(torch.from_numpy(prompts), use_cache=True, logits_to_keep=1)
            ids = out.logits[:, -1].argmax(-1, keepdim=True)
            first = time.perf_counter()
            for _ in range(steps):
                out = self.model(ids, past_key_values=out.past_key_values, use_cache=True)
                ids = out.logits[:, -1].argmax(-1, keepdim=True)
                ids.tolist()
            return first - start, time.perf_counter() - first

    def logits(self, prompt: np.ndarray) -> np.ndarray:
        import torch

        with torch.inference_mode():
            return self.model(torch.from_numpy(prompt)[None]).logits[0, -1].float().numpy()


class TransformersBf16(Transformers):
    dtype = "bfloat16"


class OnnxRuntime:
    packages = ("onnxruntime-genai", "onnxruntime")

    def __init__(self, models: Path, threads: int) -> None:
        import onnxruntime_genai

        self.genai = onnxruntime_genai
        config = onnxruntime_genai.Config(str(model_folder(models, "onnx")))
        options = {"session_options": {"intra_op_num_threads": threads}}
        config.overlay(json.dumps({"model": {"decoder": options}}))
        self.model = onnxruntime_genai.Model(config)

    def _generator(self, prompts: np.ndarray, length: int) -> Any:
        params = self.genai.GeneratorParams(self.model)
        params.set_search_options(
            max_length=length, min_length=length, batch_size=len(prompts), do_sample=False
        )
        return self.genai.Generator(self.model, params)

    def generate(self, prompts: np.ndarray, steps: int) -> tuple[float, float]:
        generator = self._generator(prompts, prompts.shape[1] + steps + 2)
        start = time.perf_counter()
        generator.append_tokens(prompts.astype(np.int32))
        generator.generate_next_token()
        first = time.perf_counter()
        for _ in range(steps):
            generator.generate_next_token()
        return first - start, time.perf_counter() - first

    def logits(self, prompt: np.ndarray) -> np.ndarray:
        generator = self._generator(prompt[None], len(prompt) + 2)
        generator.append_tokens(prompt[None].astype(np.int32))
        return np.asarray(generator.get_logits()).reshape(-1, VOCABULARY)[-1]


class OpenVino:
    packages = ("openvino",)

    def __init__(self, models: Path, threads: int) -> None:
        import openvino

        settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
        settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 128
        model = openvino.Core().compile_model(model_folder(models, "openvino") / "model.xml", "CPU", settings)
        self.request = model.create_infer_request()

    def _step(self, ids: np.ndarray, start: int) -> np.ndarray:
        batch, count = ids.shape
        inputs = {
            "input_ids": ids,
            "attention_mask": np.ones((batch, start + count), np.int64),
            "position_ids": np.arange(start, start + count)[None].repeat(batch, 0),
            "beam_idx": np.arange(batch, dtype=np.int32),
        }
        return self.request.infer(inputs, share_inputs=True, share_outputs=True)[0][:, -1]

    def generate(self, prompts: np.ndarray, steps: int) -> tuple[float, float]:
        self.request.reset_state()
        start = time.perf_counter()
        ids = self._step(prompts, 0).argmax(-1)[:, None]
        first = time.perf_counter()
        for step in range(steps):
            ids = self._step(ids, prompts.shape[1] + step).argmax(-1)[:, None]
        return first - start, time.perf_counter() - first

    def logits(self, prompt: np.ndarray) -> np.ndarray:
        self.request.reset_state()
        return self._step(prompt[None], 0)[0].copy()


class LlamaCpp:
    packages = ("llama-cpp-python",)

    def __init__(self, models: Path, threads: int) -> None:
        import llama_cpp.llama_cpp as native

        self.native = native
        native.llama_backend_init()
        path = str(model_folder(models, "gguf") / "model.gguf").encode()
        self.model = native.llama_model_load_from_file(path, native.llama_model_default_params())
        settings = native.llama_context_default_params()
        settings.n_seq_max, settings.n_batch, settings.n_ubatch = 8, 2048, 512
        settings.n_ctx = 8 * (PROMPT + MOST_STEPS)
        settings.n_threads = settings.n_threads_batch = threads
        self.context = native.llama_init_from_model(self.model, settings)
        self.batch = native.llama_batch_init(2048, 0, 1)

    def _step(self, ids: np.ndarray, start: int) -> list[np.ndarray]:
        """Run ids [B, n].  Returns the logits after the last of each."""
        batch, rows = self.batch, []
        batch.n_tokens = 0
        for sequence, row in enumerate(ids.tolist()):
            for position, token in enumerate(row):
                at, last = batch.n_tokens, position == len(row) - 1
                batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, start + position, 1
                batch.seq_id[at][0], batch.logits[at] = sequence, last
                rows += [at] * last
                batch.n_tokens += 1
        if self.native.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")
        shape = (VOCABULARY,)
        return [
            np.ctypeslib.as_array(self.native.llama_get_logits_ith(self.context, row), shape) for row in rows
        ]

    def generate(self, prompts: np.ndarray, steps: int) -> tuple[float, float]:
        self.native.llama_memory_clear(self.native.llama_get_memory(self.context), True)
        start = time.perf_counter()
        ids = np.array([[row.argmax()] for row in self._step(prompts, 0)])
        first = time.perf_counter()
        for step in range(steps):
            ids = np.array([[row.argmax()] for row in self._step(ids, prompts.shape[1] + step)])
        return first - start, time.perf_counter() - first

    def logits(self, prompt: np.ndarray) -> np.ndarray:
        self.native.llama_memory_clear(self.native.llama_get_memory(self.context), True)
        return self._step(prompt[None], 0)[0].copy()


ENGINES: dict[str, type[Any]] = {
    "pymllm int4": Pymllm,
    "pymllm bf16": PymllmFloat,
    "onnxruntime-genai int4": OnnxRuntime,
    "openvino u4": OpenVino,
    "llama.cpp Q4_0": LlamaCpp,
    "transformers f32": Transformers,
    "transformers bf16": TransformersBf16,
}


def random_prompts(batch: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, VOCABULARY, (batch, PROMPT))


def main() -> None:
    name, models, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr
    engine: Engine = ENGINES[name](models, threads)
    versions = {package: importlib.metadata.version(package) for package in engine.packages}
    print(json.dumps(versions), file=answers, flush=True)
    for seed, line in enumerate(sys.stdin):
        wanted = json.loads(line)
        if "logits" in wanted:
            answer: Any = engine.logits(random_prompts(1, 0)[0]).tolist()
        else:
            answer = engine.generate(random_prompts(wanted["batch"], seed), wanted["steps"])
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
