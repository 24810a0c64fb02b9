"""`Embedder`: texts to vectors, as sentence-transformers makes them of the same folder.

Texts run side by side without padding, so that a batch is as many tokens as it has, and a text's vector does not depend
on the texts beside it.
"""

# N texts, H hidden size, D size of a vector

from __future__ import annotations

import functools
import reprlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pymllm.embedding.pooling import Projection, pool
from pymllm.embedding.settings import Dense, EmbeddingSettings, Normalize, Pooling, read_modes, read_settings
from pymllm.engine.runner import Runner
from pymllm.errors import ConfigError, RequestError, choices, counted, nearest
from pymllm.text.prompts import Prompt, as_prompts, is_prompt
from pymllm.text.tokenizer import Tokenizer

# Of how many tokens hidden states are held at a time, where a text is not longer.
BATCH_TOKENS = 4096


@dataclass(frozen=True)
class EmbeddingInput:
    """A text as the model reads it.

    prompt: how many of the ids are the prompt's, special tokens before it included, and left out of the pooling.
    """

    ids: tuple[int, ...]
    prompt: int = 0


@dataclass(frozen=True)
class EmbeddingOptions:
    """The way in which vectors are made.

    modes: of the pooling; None: the folder's.  normalize: None: as the folder says.  dimensions: how many of the first
    numbers are kept; None: all.  adapter: a LoRA adapter's name, or None.
    """

    modes: tuple[str, ...] | None = None
    normalize: bool | None = None
    dimensions: int | None = None
    adapter: str | None = None


class Embedder:
    """The way from texts to vectors for one loaded model.

    path: the checkpoint's.  check: turns a prompt of token ids into ints, and refuses ids outside the vocabulary.
    lock: held while the model runs.  pooling: names of modes, in place of the folder's; None: as the folder says.
    """

    def __init__(
        self,
        path: Path,
        runner: Runner,
        tokenizer: Tokenizer,
        check: Callable[[Sequence[int]], list[int]],
        lock: AbstractContextManager[Any],
        pooling: str | Sequence[str] | None = None,
    ) -> None:
        self.lock = lock
        self.path, self.runner, self.tokenizer, self.check = path, runner, tokenizer, check
        self.modes = None if pooling is None else read_modes(pooling)

    @functools.cached_property
    def settings(self) -> EmbeddingSettings:
        """The folder's settings, read once they are needed, as a model may be there to generate."""
        return read_settings(self.path, self.runner.model.max_length)

    @functools.cached_property
    def reader(self) -> Tokenizer:
        """The tokenizer as it reads texts to embed; what is generated from is not put in lower case."""
        return self.tokenizer.in_lower_case() if self.settings.lower_case else self.tokenizer

    @functools.cached_property
    def projections(self) -> dict[Dense, Projection]:
        dense = [module for module in self.settings.modules if isinstance(module, Dense)]
        return {module: Projection(module, self.runner.device) for module in dense}

    def encode(
        self, texts: Sequence[Prompt], prompt_name: str | None = None, prompt: str | None = None
    ) -> list[EmbeddingInput]:
        """Turn texts into token ids, behind a prompt; a text that is too long is cut, as sentence-transformers does.

        texts: text, or token ids, which are taken as they are.  prompt_name: of one that the folder has; None: its
        default, if it has one.  prompt: a text of its own in place of that.
        RequestError for a name that is not there, for a text without tokens, and for ids that are too many.
        """
        _refuse_type("prompt", prompt, str, "a text or None")
        before = self._prompt(prompt_name) if prompt is None else prompt
        length = self.settings.max_length
        skipped = self._prompt_length(before)
        found = []
        for place, text in enumerate(texts):
            if isinstance(text, str):
                one = EmbeddingInput(tuple(self.reader.encode_cut(before + text, length)), skipped)
            else:
                one = EmbeddingInput(tuple(self.check(text)))
            if not one.prompt < len(one.ids) <= length:
                long = len(one.ids) > length
                raise RequestError(
                    "there are too many token ids" if long else "a text has no tokens of its own",
                    code="prompt-too-long" if long else "prompt-empty",
                    tensor=f"input {place}",
                    expected=f"{one.prompt + 1} to {counted(length, 'token')}",
                    found=str(len(one.ids)),
                )
            found.append(one)
        return found

    def options(
        self,
        pooling: str | Sequence[str] | None = None,
        normalize: bool | None = None,
        dimensions: int | None = None,
        adapter: str | None = None,
    ) -> EmbeddingOptions:
        """Read the options of a call.  pooling, normalize, dimensions, adapter: as for `LLM.embed`.

        ConfigError where nothing says how to pool, or for an unknown mode; RequestError for dimensions that are none.
        """
        modes = self.modes if pooling is None else read_modes(pooling)
        if modes is None and not self.settings.modules:
            raise ConfigError(
                "the checkpoint does not say how the hidden states of a text's tokens become one vector",
                code="pooling-missing",
                file=str(self.path),
                expected="modules.json and 1_Pooling/config.json, as sentence-transformers writes them",
                fix="Choose as the model was trained: embed(texts, pooling='mean') for most encoders, 'cls' for some, "
                "'lasttoken' for most decoders (--pooling for `pymllm serve`).",
            )
        _refuse_type("normalize", normalize, bool, "True, False or None")
        if dimensions is not None and (
            isinstance(dimensions, bool) or not isinstance(dimensions, int) or dimensions < 1
        ):
            raise RequestError(
                "dimensions is not a number of dimensions",
                code="parameter",
                tensor="dimensions",
                expected="an integer of at least 1",
                found=repr(dimensions),
            )
        size = self.size(EmbeddingOptions(modes))
        if dimensions is not None and dimensions > size:
            raise RequestError(
                "the vectors have fewer dimensions",
                code="parameter",
                tensor="dimensions",
                expected=f"at most {size}",
                found=str(dimensions),
            )
        return EmbeddingOptions(modes, normalize, dimensions, adapter)

    def batches(self, inputs: Sequence[EmbeddingInput]) -> Iterator[list[EmbeddingInput]]:
        """Divide inputs, in order, into batches of at most BATCH_TOKENS tokens, or of one text."""
        batch: list[EmbeddingInput] = []
        tokens = 0
        for one in inputs:
            tokens += len(one.ids)
            if batch and tokens > BATCH_TOKENS:
                yield batch
                batch, tokens = [], len(one.ids)
            batch.append(one)
        if batch:
            yield batch

    def embed(
        self,
        texts: Prompt | Sequence[Prompt],
        options: EmbeddingOptions,
        prompt_name: str | None = None,
        prompt: str | None = None,
    ) -> Tensor:
        """Make the vectors of texts.  texts, prompt_name, prompt: as for `encode`; one text may stand alone.

        Returns [N, D] float32 on the CPU, or [D] for a text alone.
        """
        if isinstance(texts, Tensor):
            texts = texts.tolist()
        inputs = self.encode(as_prompts(texts), prompt_name, prompt)
        return self.joined(texts, [self.run(batch, options) for batch in self.batches(inputs)], options)

    def joined(
        self, texts: Prompt | Sequence[Prompt], vectors: Sequence[Tensor], options: EmbeddingOptions
    ) -> Tensor:
        """Put the vectors of batches together, as `embed` returns them."""
        if not vectors:
            return torch.zeros((0, self.size(options)))
        return vectors[0][0] if is_prompt(texts) else torch.cat(list(vectors))

    def size(self, options: EmbeddingOptions) -> int:
        """Return how many numbers a vector has."""
        first, *others = self._modules(options)
        assert isinstance(first, Pooling)
        size = self.runner.model.config.size("hidden_size") * len(first.modes)
        size = next((module.outputs for module in others[::-1] if isinstance(module, Dense)), size)
        return min(size, options.dimensions or size)

    @torch.no_grad()
    def run(self, batch: Sequence[EmbeddingInput], options: EmbeddingOptions) -> Tensor:
        """Make the vectors of one batch.  Returns [N, D] float32 on the CPU."""
        with self.lock:
            hidden = self.runner.hidden_states([one.ids for one in batch], options.adapter)
        modules = self._modules(options)
        pooling = modules[0]
        assert isinstance(pooling, Pooling)
        texts = zip(hidden.split([len(one.ids) for one in batch]), batch, strict=True)
        vectors = torch.stack([pool(states, pooling, one.prompt) for states, one in texts])
        for module in modules[1:]:
            if isinstance(module, Dense):
                vectors = self.projections[module](self._fitting(module, vectors))
            elif options.normalize is not False or module is not modules[-1]:
                vectors = F.normalize(vectors, dim=-1)
        vectors = vectors[:, : options.dimensions]
        normed = isinstance(modules[-1], Normalize) if options.normalize is None else options.normalize
        # A part of a vector of length 1 is shorter.
        if normed and (options.dimensions or options.normalize):
            vectors = F.normalize(vectors, dim=-1)
        return vectors.cpu()

    def _modules(self, options: EmbeddingOptions) -> tuple[Pooling | Dense | Normalize, ...]:
        """Return the folder's modules, with the pooling that the options ask for."""
        modules = self.settings.modules
        if options.modes is None:
            return modules
        own = modules[0] if modules else None
        include = own.include_prompt if isinstance(own, Pooling) else True
        return (Pooling(options.modes, include), *modules[1:])

    @staticmethod
    def _fitting(dense: Dense, vectors: Tensor) -> Tensor:
        if vectors.shape[-1] != dense.inputs:
            raise ConfigError(
                "the projection takes other vectors than the pooling gives",
                code="embedding-setting",
                file=str(dense.folder / "config.json"),
                tensor="in_features",
                expected=str(vectors.shape[-1]),
                found=str(dense.inputs),
            )
        return vectors

    def _prompt(self, name: str | None) -> str:
        _refuse_type("prompt_name", name, str, "a prompt's name or None")
        prompts = self.settings.prompts
        name = self.settings.default_prompt if name is None else name
        if name is None:
            return ""
        if name not in prompts:
            raise RequestError(
                f"the model has no prompt {name[:140]!r}",
                code="prompt-name",
                tensor="prompt_name",
                expected=choices(prompts, name[:140]) or "none, as the checkpoint has no prompts",
                found=repr(name[:140]),
                fix=nearest(name[:140], prompts),
            )
        return prompts[name]

    def _prompt_length(self, prompt: str) -> int:
        """Count a prompt's tokens, the special ones before it included; 0 where they are pooled as any other."""
        own = self.settings.modules[:1]
        if not prompt or not own or not isinstance(own[0], Pooling) or own[0].include_prompt:
            return 0
        alone = self.reader.encode(prompt, add_special_tokens=False)
        whole = self.reader.encode(prompt)
        # What the tokenizer adds at the end comes behind the text.
        return len(whole) - (len(whole) > len(alone) and whole[-len(alone) :] != alone)


def _refuse_type(name: str, value: Any, kind: type, expected: str) -> None:
    """Raise RequestError unless an argument is None or of its type."""
    if value is not None and not isinstance(value, kind):
        raise RequestError(
            f"{name} is of another type",
            code="parameter",
            tensor=name,
            expected=expected,
            found=reprlib.repr(value),
        )
