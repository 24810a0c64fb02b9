"""`LLM`: a model that is loaded and ready to answer."""

# T tokens, V vocabulary

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pymllm.api.adaptable import Adaptable
from pymllm.api.texts import choose_tokenizer, default_params, encode, end_tokens
from pymllm.api.warming import compile_kernels, why_not_warmed
from pymllm.arguments import checked
from pymllm.embedding.embedder import Embedder
from pymllm.engine.asking import Asked, ask, check_record, gather
from pymllm.engine.engine import Engine
from pymllm.engine.outputs import GenerationOutputs
from pymllm.engine.pace import STEP_MS, check_step_ms
from pymllm.engine.request import RequestOutput
from pymllm.engine.runner import Runner
from pymllm.engine.sampling import SamplingParams
from pymllm.engine.scoring import PairEncoder, Score, Scoring, pair_up
from pymllm.engine.session import Session, StreamPiece
from pymllm.errors import RequestError
from pymllm.kernels.attention import PAGE_SIZE
from pymllm.loading.agreement import settings_for_ranks
from pymllm.loading.load import load_prepared
from pymllm.loading.prepare import Prepared, prepare
from pymllm.parallel import Ranks, choose_parallel
from pymllm.parallel.ranked import ends_ranks
from pymllm.planning.deciding import decide
from pymllm.planning.plan import Plan
from pymllm.planning.room import measure_cache
from pymllm.quantization.rules import RuleSource
from pymllm.text.grammars import GrammarCompiler
from pymllm.text.prompts import Prompt, as_prompts
from pymllm.text.tokenizer import Tokenizer, read_json
from pymllm.weights.report import LoadReport


class LLM(Adaptable):
    """A checkpoint, loaded for generation.

    llm = pymllm.LLM("path/to/model", quant={"**.mlp.**": "fp8"})

    model: a folder of config.json and safetensors files, a .gguf file, or a hub id "org/name"; None: the small model
    that comes with the package.
    quant: rules over the checkpoint's own config, {"**.mlp.**": "fp8"} say, or a list of "PATTERN=METHOD" lines, or
    "@FILE"; None: as stored.
    device: "auto" (a GPU where there is one), "cpu", "cuda" or, of several GPUs, "cuda:1".
    dtype: of what layers pass to each other, "bfloat16" say; "auto": the checkpoint's own, but float32 on a CPU for a
    quantised one.
    tensor_parallel_size: how many ranks share the model: those of torchrun, or processes that are started here and end
    with this one.  ranks: where they meet; None: on this machine.
    expert_parallel: whether ranks hold whole experts, some each, instead of a share of every one (docs/moe.md).
    compute: "auto" lets kernels round their inputs to fewer bits where that is faster, "exact" forbids it, "checkpoint"
    demands what the checkpoint asks for.
    kernels: the kernel of an operation by name, {"linear": "reference"} say; None: the best that can.
    kv_cache: how keys and values are stored: "fp8", "int8", "none", a dtype's name, or such methods for patterns of
    attention layers; None: as the checkpoint says.
    revision: a branch, tag or commit of a hub id; None: its main branch.
    definition: "auto" runs the page of the model's type, or transformers' class if there is none; "transformers" that.
    strategy: how answers are decoded, "block_diffusion:block_length=32" say; None: as the model was trained for.
    progress: whether to show a bar while loading; None: on a terminal.
    packed_cache: where packed weights are kept, so that the next start is quick: "auto", a folder, or "off"
    (docs/starting.md).
    adapters: LoRA adapters by the names that requests choose them by: folders, as PEFT writes them, or hub ids.
    check_memory: whether to refuse, with numbers, a model that the plan says does not fit into what is free.
    max_model_len: the most tokens of a request and its answer; None: as many as the model, and the KV cache, can have.
    kv_memory: what the KV cache may take, "2GB", "512MiB", "30%" or a number of bytes; None: a quarter of what is free
    beside the weights, but no more than 16384 tokens, or one request of that length, need; on a GPU nine tenths of what
    steps leave, but no more than 64 such requests need.
    prefix_reuse: whether a request takes over the keys and values that others have computed of the same first tokens.
    step_ms: how many milliseconds a step may take that reads prompts beside answers.
    warm_up: whether a GPU's kernels are compiled before the first request; on a CPU there are none to compile.
    pooling: how `embed` makes a vector of a text's hidden states; None: as the checkpoint's folder says.
    chat_template: a file of Jinja text, or such text, in place of the checkpoint's chat template.
    tokenizer: a folder, a tokenizer.json, a .gguf file or a hub id whose tokenizer takes the place of the checkpoint's.
    before_loading: is called with what was decided, its plan and the tokenizer before a tensor is read; it may raise.
    `plan` says what runs, and why. Several threads may use one LLM; they take turns. An encoder only embeds.
    Raises what `load_model` raises, and ConfigError for a tensor_parallel_size that is not the job's.
    """

    @checked()
    @ends_ranks
    def __init__(
        self,
        model: str | Path | None = None,
        quant: RuleSource = None,
        device: str = "auto",
        dtype: str | torch.dtype = "auto",
        tensor_parallel_size: int = 1,
        *,
        expert_parallel: bool = False,
        compute: str = "auto",
        kernels: Mapping[str, str] | None = None,
        kv_cache: RuleSource = None,
        revision: str | None = None,
        definition: str = "auto",
        strategy: str | None = None,
        progress: bool | None = None,
        packed_cache: str | Path = "off",
        adapters: Mapping[str, str | Path] | None = None,
        check_memory: bool = True,
        max_model_len: int | None = None,
        kv_memory: int | str | None = None,
        prefix_reuse: bool = True,
        step_ms: float = STEP_MS,
        warm_up: bool = True,
        pooling: str | Sequence[str] | None = None,
        chat_template: str | Path | None = None,
        tokenizer: str | Path | None = None,
        before_loading: Callable[[Prepared, Plan, Tokenizer], object] | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        check_step_ms(step_ms)
        options: dict[str, Any] = dict(
            device=device,
            dtype=dtype,
            compute=compute,
            kernels=kernels,
            revision=revision,
            quant=quant,
            kv_cache=kv_cache,
            definition=definition,
            strategy=strategy,
        )
        beside: dict[str, Any] = dict(
            adapters=adapters, check_memory=check_memory, max_model_len=max_model_len, kv_memory=kv_memory
        )
        told = {**options, **beside, "expert_parallel": expert_parallel, "progress": False}
        told["packed_cache"] = str(packed_cache)
        settings = settings_for_ranks(model, told) if tensor_parallel_size > 1 else None
        self.parallel = choose_parallel(tensor_parallel_size, expert_parallel, ranks, settings, device)
        self._own_ranks()
        with self.parallel:

            def open_text(prepared: Prepared, plan: Plan) -> None:
                self.tokenizer = choose_tokenizer(prepared, tokenizer, chat_template)
                self.tokenizer.longest_prompt = plan.kv_cache.get("max_model_len")
                if before_loading is not None:
                    before_loading(prepared, plan, self.tokenizer)

            prepared, self.plan = decide(self.parallel, model, options, before_loading=open_text, **beside)
            self.model = load_prepared(prepared, progress=progress, packed_cache=packed_cache)
            self.plan = measure_cache(self.plan, prepared, max_model_len, kv_memory)
        self.prepared = prepared
        self.config = prepared.config
        self.path = prepared.checkpoint.path
        self._lock = threading.RLock()
        where = torch.device(prepared.execution.device)
        self._engine: Engine | None = None
        if self.generates:
            self._engine = Engine(
                self.model,
                parallel=self.parallel,
                device=where,
                dtype=prepared.execution.dtype,
                max_length=self.plan.kv_cache["max_model_len"],
                cache_pages=self.plan.kv_cache["tokens"] // PAGE_SIZE,
                state_slots=self.plan.kv_cache["requests"],
                remembered_states=self.plan.kv_cache["remembered_states"],
                end_tokens=self._end_tokens(),
                sampling_kernel=prepared.execution.forced_kernel("sampling"),
                prefix_reuse=prefix_reuse,
                step_ms=step_ms,
            )
            self.tokenizer.longest_prompt = self._engine.longest
            self.default_params()  # refused now, where no request could have them
            if warm_up and why_not_warmed(prepared) is None:
                with self.parallel:
                    compile_kernels(lambda: prepare(model, **options), self.plan, progress)
        runner = Runner(self.model, where) if self._engine is None else self._engine.runner
        self.grammars = GrammarCompiler(self.tokenizer, self.config.size("vocab_size"), self._end_tokens())
        self.embedder = Embedder(self.path, runner, self.tokenizer, self.encode, self._lock, pooling)
        for name, folder in (adapters or {}).items():
            self.load_adapter(name, folder)
        self._lead()

    @property
    def generates(self) -> bool:
        """True for a model that generates text; False for one that only embeds it."""
        return self.model.why_no_text is None

    @property
    def engine(self) -> Engine:
        """The engine that generates.  ConfigError for a model that does not."""
        self.model.check_generates()
        assert self._engine is not None
        return self._engine

    @property
    def load_report(self) -> LoadReport:
        """The report of the load: what became of every checkpoint tensor."""
        report: LoadReport = self.model.load_report  # type: ignore[assignment]
        return report

    @functools.cached_property
    def generation_config(self) -> dict[str, Any]:
        """The checkpoint's generation_config.json; {} without one."""
        return read_json(self.path / "generation_config.json")

    def _end_tokens(self) -> frozenset[int]:
        return end_tokens(self.prepared)

    def default_params(self, **overrides: Any) -> SamplingParams:
        """Make the sampling parameters that the checkpoint's generation_config recommends.

        overrides: fields of `SamplingParams` that are to be others.
        """
        self.model.check_generates()
        return default_params(self.prepared, self.generation_config, **overrides)

    def encode(self, prompt: Prompt) -> list[int]:
        """Turn a prompt into token ids; a prompt of ids is checked against the vocabulary.

        RequestError for an id outside of it, or a prompt that is neither text nor ids.
        """
        return encode(self.tokenizer, prompt, self.config.size("vocab_size"))

    def encode_to_answer(self, prompt: Prompt) -> list[int]:
        """Turn a prompt into token ids; a text that is far too long to be answered is refused unread (RequestError)."""
        if isinstance(prompt, str):
            self.tokenizer.check_length(prompt)
        return self.encode(prompt)

    @checked()
    def embed(
        self,
        texts: Prompt | Sequence[Prompt],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        pooling: str | Sequence[str] | None = None,
        normalize: bool | None = None,
        dimensions: int | None = None,
        adapter: str | None = None,
    ) -> Tensor:
        """Make the vectors of texts, as sentence-transformers makes them of the same folder (docs/embeddings.md).

        texts: one or several, text or token ids each. A text is cut at the folder's max_seq_length; ids are taken as
        they are.
        prompt_name: of a prompt of the folder that is put before each text; None: its default, if it has one.
        prompt: a prompt of its own in place of that.
        pooling: cls, max, mean, mean_sqrt_len_tokens, weightedmean, lasttoken, or several; None: as the folder says.
        normalize: whether vectors have length 1; None: as the folder says.
        dimensions: how many numbers of each vector are kept; what had length 1 has it again.
        adapter: the name of one in `adapters`, or None.
        Returns [N, D] float32 on the CPU, or [D] for a single text.
        """
        options = self.embedder.options(pooling, normalize, dimensions, self.check_adapter(adapter))
        return self.embedder.embed(texts, options, prompt_name, prompt)

    @checked()
    def logits(self, token_ids: Sequence[int] | Tensor, *, adapter: str | None = None) -> Tensor:
        """Compute the logits after each of the tokens, in one forward without a cache.

        adapter: the name of one in `adapters`, or None.  Returns [T, V] float32 on the CPU.
        """
        self.check_adapter(adapter)
        ids = self.encode(token_ids)  # type: ignore[arg-type]
        if not ids:
            return torch.zeros((0, self.config.size("vocab_size")))
        self.engine.check_text(len(ids))
        with self._lock:
            return self.engine.runner.logits(ids, adapter).float().cpu()

    @checked({"params": SamplingParams})
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | Sequence[str | None] | None = None,
        outputs: GenerationOutputs | None = None,
    ) -> list[RequestOutput]:
        """Answer one prompt or several, batched.  Returns one answer a prompt, in the order of the prompts.

        prompts: text or token ids each.  params: one for all, or one each; None: `default_params()`. Where they ask
        for n answers, the first has all of them as `outputs`.
        adapter: one for all, or one each: the name of one in `adapters`, or None.
        outputs: records every step, for metrics and trajectories, one an answer: `GenerationOutputs` of the sum of n.
        """
        self.model.check_generates()
        params = self.default_params() if params is None else params
        asked = ask(as_prompts(prompts), params, adapter, self.encode_to_answer)
        check_record(outputs, asked)
        pieces = ((place, piece.index, piece.output) for place, piece in self._run(asked, outputs))
        return gather({(place, index): output for place, index, output in pieces if output is not None})

    @checked({"params": SamplingParams})
    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        adapter: str | None = None,
        outputs: GenerationOutputs | None = None,
    ) -> Iterator[StreamPiece]:
        """Answer one prompt piece by piece; the last piece carries the output.  Closing the iterator aborts.

        Where params ask for n answers, their pieces come mixed, each with its `index`, and each answer has its output.

        prompt, params, adapter, outputs: as for `generate`.
        """
        return (piece for _, piece in self.stream_all([prompt], params, adapter=adapter, outputs=outputs))

    @checked({"params": SamplingParams})
    def stream_all(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | None = None,
        outputs: GenerationOutputs | None = None,
    ) -> Generator[tuple[int, StreamPiece], None, None]:
        """Answer several prompts at a time, piece by piece, each with the index of its prompt; else as `stream`.

        params: one for all, or one each.
        """
        self.model.check_generates()
        # Here, so that a bad one fails at once, not at the first piece.
        params = self.default_params() if params is None else params
        asked = ask(as_prompts(prompts), params, self.check_adapter(adapter), self.encode_to_answer)
        check_record(outputs, asked)
        return self._run(asked, outputs)

    @checked({"params": SamplingParams})
    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        adapter: str | None = None,
        **template: Any,
    ) -> RequestOutput:
        """Answer [{"role": ..., "content": ...}, ...] through the checkpoint's chat template; else as `generate`.

        template: further arguments of `Tokenizer.render_chat`: tools, variables, continue_final_message, ...
        """
        self.model.check_generates()
        prompt = self.tokenizer.apply_chat_template(messages, **template)
        return self.generate([prompt], params, adapter=adapter)[0]

    @checked()
    def score(
        self,
        prompts: Prompt | Sequence[Prompt],
        continuations: Prompt | Sequence[Prompt | None] | None = None,
        *,
        adapter: str | None = None,
    ) -> list[Score]:
        """Compute how likely the model finds continuations of prompts; a prompt that several share is read once.

        prompts: text or token ids each.  continuations: one each, or several of a single prompt. Two texts are encoded
        as one, as lm-eval does. None: the tokens of the prompt after its first are scored; a text that is longer than
        the context is then read in windows.  adapter: the name of one in `adapters`, or None.
        """
        scoring = self.scoring(prompts, continuations, adapter)
        with self.session() as session:
            return scoring.run(session)

    def scoring(
        self,
        prompts: Prompt | Sequence[Prompt],
        continuations: Prompt | Sequence[Prompt | None] | None,
        adapter: str | None,
    ) -> Scoring:
        """Prepare what `score` runs; the arguments are its own."""
        encode = PairEncoder(self.tokenizer, self.encode)
        return Scoring(
            encode(pair_up(prompts, continuations)), self.check_adapter(adapter), self.engine.longest
        )

    def _run(
        self, asked: Sequence[Asked], outputs: GenerationOutputs | None = None
    ) -> Generator[tuple[int, StreamPiece], None, None]:
        """Run requests to their end, one piece a token, with the place of its prompt."""
        with self.session() as session:
            for one in asked:
                self.check_adapter(one.adapter)
            yield from session.run(asked, outputs)

    @contextlib.contextmanager
    def session(self) -> Iterator[Session]:
        """Give the engine to this thread alone, for requests that come and go; what has not finished ends with it.

        RequestError where the thread has a stream that has not ended.
        """
        with self._lock:
            if not self.engine.idle:  # the lock lets its own thread in again
                raise RequestError(
                    "this thread has a stream that has not ended",
                    code="stream-open",
                    fix="Read it to its end or close it first; to batch prompts, pass them together.",
                )
            session = Session(self.engine, self.tokenizer, self.grammars)
            try:
                yield session
            finally:
                session.close()
