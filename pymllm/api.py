"""The front door: a model, loaded and ready to answer."""

# T tokens, V vocabulary

from __future__ import annotations

import functools
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pymllm.engine.engine import Engine
from pymllm.engine.request import Request, RequestOutput, TokenLogprobs
from pymllm.engine.sampling import SamplingParams
from pymllm.engine.tokenizer import TextStream, Tokenizer
from pymllm.errors import ConfigError, RequestError
from pymllm.loading import load_prepared
from pymllm.parallel import Parallel, current_parallel
from pymllm.planning import Plan, make_plan
from pymllm.preparation import prepare
from pymllm.quantization.rules import RuleSource

Prompt = str | Sequence[int]


def shipped_model() -> Path:
    """The folder of the small trained model that comes with the package."""
    return Path(__file__).parent / "shipped_model"


@dataclass(frozen=True)
class StreamPiece:
    """A step of a streamed answer.

    text: may be empty while a character is incomplete.  output: once it is finished.  logprobs: if asked for.
    """

    text: str
    token_id: int
    output: RequestOutput | None = None
    logprobs: TokenLogprobs | None = None


class LLM:
    """A checkpoint, loaded for generation.

    llm = LLM("path/to/model", quant={"**.mlp.**": "fp8"})

    model: a folder or a hub id; None: the model that comes with the package.  The other arguments are those of
    `pymllm.load_model`.  tensor_parallel_size: above 1, this process must be one of as many ranks (torchrun).
    plan: what runs, and why.  Usable from several threads; they take turns.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        quant: RuleSource = None,
        device: str = "auto",
        dtype: str | torch.dtype = "auto",
        tensor_parallel_size: int = 1,
        *,
        compute: str = "auto",
        kernels: Mapping[str, str] | None = None,
        revision: str | None = None,
        progress: bool | None = None,
    ) -> None:
        self.parallel = choose_parallel(tensor_parallel_size)
        with self.parallel:
            prepared = prepare(
                shipped_model() if model is None else model,
                quant,
                device=device,
                dtype=dtype,
                compute=compute,
                kernels=kernels,
                revision=revision,
            )
            self.plan: Plan = make_plan(prepared)
            self.model = load_prepared(prepared, progress=progress)
        self.prepared = prepared
        self.config = prepared.config
        self.path = prepared.checkpoint.path
        self.tokenizer = Tokenizer(self.path)
        self._lock = threading.RLock()
        self.engine = Engine(
            self.model,
            parallel=self.parallel,
            device=torch.device(prepared.execution.device),
            dtype=prepared.execution.dtype,
            max_length=self.config.size("max_position_embeddings"),
            end_tokens=self._end_tokens(),
        )

    @property
    def load_report(self) -> Any:
        """What became of every checkpoint tensor."""
        return self.model.load_report

    @functools.cached_property
    def generation_config(self) -> dict[str, Any]:
        """The checkpoint's generation_config.json; {} without one."""
        from pymllm.engine.tokenizer import read_json

        return read_json(self.path / "generation_config.json")

    def _end_tokens(self) -> frozenset[int]:
        ends = self.generation_config.get("eos_token_id", self.config.get("eos_token_id"))
        return frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])

    def default_params(self, **overrides: Any) -> SamplingParams:
        """Sampling as the checkpoint's generation_config recommends it, with `overrides`."""
        recommended = {}
        if self.generation_config.get("do_sample"):
            recommended = {
                name: self.generation_config[name]
                for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
                if self.generation_config.get(name) is not None
            }
        return SamplingParams(**{**recommended, **overrides})

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt; ids are checked against the vocabulary.  RequestError names the first bad one."""
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
        vocabulary = self.config.size("vocab_size")
        bad = next((token for token in ids if not 0 <= token < vocabulary), None)
        if bad is not None:
            raise RequestError(
                "a token id lies outside the vocabulary",
                code="token-id",
                tensor="prompt",
                expected=f"0 to {vocabulary - 1}",
                found=str(bad),
            )
        return ids

    def logits(self, token_ids: Sequence[int] | Tensor) -> Tensor:
        """Logits after each of the tokens, from one forward without a cache.  Returns [T, V] float32 on the CPU."""
        ids = self.encode(token_ids.tolist() if isinstance(token_ids, Tensor) else token_ids)
        if not ids:
            return torch.zeros((0, self.config.size("vocab_size")))
        with self._lock:
            return self.engine.runner.logits(ids).float().cpu()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Answer one prompt or several, batched.  A prompt is text or token ids; params: one for all, or one each."""
        many = self._as_list(prompts)
        each = list(params) if isinstance(params, Sequence) else [params or self.default_params()] * len(many)
        if len(each) != len(many):
            raise RequestError(
                "there must be one SamplingParams, or one for each prompt",
                code="parameter",
                tensor="params",
                expected=str(len(many)),
                found=str(len(each)),
            )
        outputs: list[RequestOutput | None] = [None] * len(many)
        for index, piece in self._run([self.encode(prompt) for prompt in many], each):
            outputs[index] = piece.output
        return [output for output in outputs if output is not None]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[StreamPiece]:
        """Answer one prompt piece by piece; the last piece carries the output.  Closing the iterator aborts."""
        return (piece for _, piece in self.stream_all([prompt], params))

    def stream_all(
        self, prompts: Sequence[Prompt], params: SamplingParams | None = None
    ) -> Generator[tuple[int, StreamPiece], None, None]:
        """Answer several prompts at a time, piece by piece, each with the index of its prompt; as `stream` else."""
        ids = [self.encode(prompt) for prompt in prompts]  # a bad one fails here, not at the first piece
        return self._run(ids, [params or self.default_params()] * len(ids))

    def chat(
        self, messages: Sequence[Mapping[str, Any]], params: SamplingParams | None = None
    ) -> RequestOutput:
        """Answer a conversation ([{"role": ..., "content": ...}]) through the checkpoint's chat template."""
        return self.generate([self.tokenizer.apply_chat_template(messages)], params)[0]

    @staticmethod
    def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
        if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int)):
            return [prompts]  # type: ignore[list-item]
        return list(prompts)  # type: ignore[arg-type]

    def _run(
        self, prompts: list[list[int]], params: list[SamplingParams]
    ) -> Generator[tuple[int, StreamPiece], None, None]:
        """Run requests to their end, one piece a token, with the index of the request."""
        requests = [
            Request(ids, p, len(ids) + p.max_tokens if p.max_tokens is not None else self.engine.max_length)
            for ids, p in zip(prompts, params, strict=True)
        ]
        texts = [TextStream(self.tokenizer, p.stop) if self.tokenizer.available else None for p in params]
        unfinished = {id(request): index for index, request in enumerate(requests)}
        with self._lock:
            try:
                for request in requests:
                    self.engine.add(request)
                while unfinished:
                    for request in self.engine.step():
                        index = unfinished[id(request)]
                        piece = self._piece(request, texts[index])
                        if piece.output is not None:
                            del unfinished[id(request)]
                        yield index, piece
            finally:
                for request in requests:
                    if id(request) in unfinished:
                        self.engine.abort(request)

    def _piece(self, request: Request, text: TextStream | None) -> StreamPiece:
        token = request.answer[-1]
        ended_by_token = request.finish_reason == "stop"
        piece = "" if text is None or ended_by_token else text.push(token)
        if text is not None and text.stopped and request.finish_reason is None:
            request.finish_reason = "stop"
            self.engine.retire(request)
        logprobs = request.logprobs[-1] if request.logprobs else None
        if request.finish_reason is None:
            return StreamPiece(piece, token, logprobs=logprobs)
        if text is not None:
            piece += text.finish()
            if text.stopped:
                request.finish_reason = "stop"
        return StreamPiece(piece, token, request.output(text.text if text is not None else ""), logprobs)


def choose_parallel(size: int) -> Parallel:
    """The current `Parallel`, or the one that torchrun started.  ConfigError if its size is not the one asked for."""
    parallel = current_parallel()
    if parallel.size == 1:
        parallel = Parallel.from_environment()
    if size not in (1, parallel.size):
        raise ConfigError(
            f"tensor_parallel_size is {size}, but {parallel.size} process{'es' * (parallel.size > 1)} of this job run",
            code="tp-processes",
            expected=f"{size} processes",
            found=str(parallel.size),
            fix=f"Start with: torchrun --nproc-per-node {size} -m pymllm ... (or your script).",
        )
    return parallel
