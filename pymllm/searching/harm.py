"""What a method does to a model's answers: an estimate for one weight, and the true divergence of a whole choice.

The estimate is the second-order term of KL(model || changed model).  With x_t a layer's inputs, g_t the gradient of
log p(y_t) by its outputs and ΔW the change of its weight, it is ½ mean_t (g_t · ΔW x_t)².  Each y_t is drawn from the
model's own distribution: the gradients' covariance is then the Fisher information.  One pass forward and one backward
give x and g of a layer, and each method costs one product more.  Terms between two tokens of one layer are left out.
A head's harm needs no estimate: what reaches it is known, so its divergence is computed.

The model runs in float32, a step (an embedding, a block, a norm, a head) at a time, as in calibration; what is kept of
the other steps is their input, [T, H].
"""

# T tokens, H hidden size, V vocabulary, O out_features, I in_features

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from pymllm.config import Execution
from pymllm.loading.prepare import Prepared
from pymllm.models.language_model import LanguageModel
from pymllm.searching.methods import Method
from pymllm.searching.weights import SearchedWeight
from pymllm.text.windows import Windows
from pymllm.writing.float_model import FloatModel, FloatStep
from pymllm.writing.layers import Step

# Kernels with gradients, for every family.
DIFFERENTIABLE = Execution(
    kernels=(("attention", "reference"), ("elementwise", "torch"), ("routing", "torch"))
)
ROWS = 256  # tokens whose logits are held at a time

Choices = Mapping[str, Method]  # by the name of a weight; a weight that is not among them stays as it is


class Passes:
    """The passes of a model over a text.

    advance: called with the bytes of each step that was read.
    """

    def __init__(
        self,
        prepared: Prepared,
        steps: Sequence[Step],
        weights: Sequence[SearchedWeight],
        windows: Windows,
        advance: Callable[[int], object] = lambda nbytes: None,
    ) -> None:
        self.steps, self.windows, self.advance = steps, windows, advance
        self.by_step: dict[int, list[SearchedWeight]] = {}
        for weight in weights:
            self.by_step.setdefault(weight.step, []).append(weight)
        self.floats = FloatModel(prepared, windows, DIFFERENTIABLE)
        root = self.floats.modules[""]
        assert isinstance(root, LanguageModel)
        self.root = root
        # The last step is the head. A tied one has no tensors: the embedding's step gives it the table.
        self.head = len(steps) - 1 if steps[-1].layers else 0

    @contextlib.contextmanager
    def _step(self, index: int) -> Iterator[FloatStep]:
        step = self.steps[index]
        with self.floats.materialised(step, {layer.name: layer.read() for layer in step.layers}) as running:
            yield running
        self.advance(step.nbytes)

    @torch.no_grad()
    def divergences(self, choices: Sequence[Choices]) -> list[float]:
        """Measure KL(model || model with these methods) for each choice: the mean over all tokens, in nats.

        Weights are rounded as loading would round them, and everything is computed in float32.
        """
        states: list[Tensor | None] = [None] * (1 + len(choices))
        for index in range(len(self.steps)):
            with self._step(index) as running:
                known: dict[tuple[str, str], dict[str, Tensor]] = {}
                for which in range(len(states)):
                    with self._changed(running, index, {} if which == 0 else choices[which - 1], known):
                        self.floats.hidden = states[which]
                        states[which] = running.run()
        original, *others = (state for state in states if state is not None)
        with self._step(self.head) as running:
            return [
                self._kl(running, self._head_changes(running, choice), original, hidden)
                for choice, hidden in zip(choices, others, strict=True)
            ]

    @torch.no_grad()
    def estimate(
        self,
        methods: Sequence[Method],
        wanted: Callable[[SearchedWeight, Method], bool],
        found: Callable[[SearchedWeight, Method, float], object],
        seed: int = 0,
    ) -> None:
        """Estimate the harm of methods, from the last step to the first, as long as anything is wanted.

        found: called with each harm as soon as it is known, in nats a token.  seed: of the drawn labels.
        """
        todo = {
            weight.name: [method for method in methods if wanted(weight, method)]
            for group in self.by_step.values()
            for weight in group
        }
        first = min((w.step for group in self.by_step.values() for w in group if todo[w.name]), default=None)
        if first is None:
            return
        inputs: list[Tensor | None] = []
        for index in range(len(self.steps)):
            inputs.append(self.floats.hidden)
            with self._step(index) as running:
                self.floats.hidden = running.run()
        hidden = self.floats.hidden
        assert hidden is not None
        with self._step(self.head) as running:
            gradient = self._head_gradient(hidden, seed)
            heads = self._head_weights()
            harms = {
                (weight.name, method.text): self._kl(
                    running, weight.rounded(method, running.weights), hidden, hidden
                )
                for weight in heads
                for method in todo[weight.name]
            }
        for weight in heads if self.head else ():
            for method in todo[weight.name]:
                found(weight, method, harms[weight.name, method.text])
        # The head's step leaves hidden states as they are, so that their gradient begins before it.
        for index in range(len(self.steps) - 2, first - 1, -1):
            gradient = self._backward(index, inputs[index], gradient, harms, found, todo)

    def _head_weights(self) -> list[SearchedWeight]:
        return [weight for weight in self.by_step.get(self.head, ()) if self.head or weight.tied]

    def _log_probs(self, hidden: Tensor) -> Tensor:
        logits = self.root.compute_logits(hidden)
        assert logits is not None
        return logits.float().log_softmax(-1)

    def _head_gradient(self, hidden: Tensor, seed: int) -> Tensor:
        """Draw a label for each token, and return the gradient of its log probability by the hidden states [T, H]."""
        generator = torch.Generator().manual_seed(seed)
        gradient = torch.empty_like(hidden)
        for start in range(0, len(hidden), ROWS):
            with torch.enable_grad():
                rows = hidden[start : start + ROWS].clone().requires_grad_()
                scores = self._log_probs(rows)
                labels = torch.multinomial(scores.detach().exp(), 1, generator=generator)
                (gradient[start : start + ROWS],) = torch.autograd.grad(scores.gather(1, labels).sum(), rows)
        return gradient

    def _head_changes(self, running: FloatStep, choice: Choices) -> dict[str, Tensor]:
        """Return the weights that a choice gives the head, by layer name."""
        changed: dict[str, Tensor] = {}
        for weight in self._head_weights():
            method = choice.get(weight.name)
            if method is not None and method.target is not None:
                changed |= weight.rounded(method, running.weights)
        return changed

    def _kl(
        self, running: FloatStep, changed: Mapping[str, Tensor], original: Tensor, hidden: Tensor
    ) -> float:
        """Compute the mean KL, in nats a token, of a changed head over `hidden` from the head over `original`.

        changed: the head's new weights, by layer name.  original, hidden: [T, H].
        """
        total = 0.0
        for start in range(0, len(hidden), ROWS):
            rows = slice(start, start + ROWS)
            expected = self._log_probs(original[rows])
            with _replaced(running, changed):
                found = self._log_probs(hidden[rows])
            total += float((expected.exp() * (expected - found)).sum())
        # Rounding alone makes it negative.
        return max(total / len(hidden), 0.0)

    @contextlib.contextmanager
    def _changed(
        self,
        running: FloatStep,
        index: int,
        choice: Choices,
        known: dict[tuple[str, str], dict[str, Tensor]],
    ) -> Iterator[None]:
        """Give a step the weights of a choice, for the time of a `with` block.

        known: what was rounded for other choices, by weight and method; that of blocks is kept there.
        """
        changed: dict[str, Tensor] = {}
        for weight in self.by_step.get(index, ()):
            method = choice.get(weight.name)
            if method is None or method.target is None:
                continue
            rounded = known.get((weight.name, method.text)) or weight.rounded(method, running.weights)
            if self.steps[index].block is not None:
                known[weight.name, method.text] = rounded
            changed |= rounded
        with _replaced(running, changed):
            yield

    def _backward(
        self,
        index: int,
        hidden: Tensor | None,
        gradient: Tensor,
        harms: Mapping[tuple[str, str], float],
        found: Callable[[SearchedWeight, Method, float], object],
        todo: Mapping[str, list[Method]],
    ) -> Tensor:
        """Run a step again with gradients, and find the harm of its weights.  Returns the gradient of its input."""
        weights = [weight for weight in self.by_step.get(index, ()) if todo[weight.name]]
        ids, count = self.floats.ids, len(self.floats.ids)
        with self._step(index) as running:
            if hidden is None:
                for weight in weights:
                    for method in todo[weight.name]:
                        (layer,) = weight.layers
                        change = (
                            weight.rounded(method, running.weights)[layer.name] - running.weights[layer.name]
                        )
                        moved = gradient * change[ids] * self.floats.embedding_scale  # [T, H]
                        harm = 0.5 * float(moved.sum(-1).square().sum()) / count
                        found(weight, method, harm + harms.get((weight.name, method.text), 0.0))
                return gradient
            with torch.enable_grad():
                self.floats.hidden = hidden.clone().requires_grad_()
                with _recorded(self.floats, running) as seen:
                    output = running.run()
                    before, *theirs = torch.autograd.grad(
                        output,
                        [self.floats.hidden, *(made for calls in seen.values() for _, made in calls)],
                        gradient,
                        allow_unused=True,
                        materialize_grads=True,
                    )
            gradients = iter(theirs)
            reached = {
                name: [(given.detach(), next(gradients)) for given, _ in calls]
                for name, calls in seen.items()
            }
            for weight in weights:
                for method in todo[weight.name]:
                    rounded = weight.rounded(method, running.weights)
                    # A weight that nothing has reached says nothing of itself: it is not to be changed.
                    harm = 0.0 if any(layer.name in reached for layer in weight.layers) else math.inf
                    for names in _together(weight, reached):
                        # A token's error is the sum over the parts that read the same input.
                        errors = [
                            ((given @ (rounded[name] - running.weights[name]).t()) * made).sum(-1)
                            for name in names
                            for given, made in reached[name]
                        ]
                        harm += 0.5 * float(torch.stack(errors).sum(0).square().sum()) / count
                    found(weight, method, harm)
        return before


def _together(weight: SearchedWeight, reached: Mapping[str, list[tuple[Tensor, Tensor]]]) -> list[list[str]]:
    """Group the layers of a weight: the parts of one product together, each expert's product alone."""
    names = [layer.name for layer in weight.layers if layer.name in reached]
    if weight.shape is not None:
        return [names] if names else []
    return [[name] for name in names]


@contextlib.contextmanager
def _recorded(floats: FloatModel, running: FloatStep) -> Iterator[dict[str, list[tuple[Tensor, Tensor]]]]:
    """Record what each layer is given and makes, [*, I] and [*, O] by its name, while a step runs."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
    handles = []

    def watch(names: Sequence[str]) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        sizes = [running.weights[name].shape[0] for name in names]

        def hook(module: nn.Module, args: tuple[Tensor, ...], made: Tensor) -> Tensor:
            # The parts are put together again: what follows must depend on what is recorded.
            parts = made.flatten(0, -2).split(sizes, dim=-1)
            for name, part in zip(names, parts, strict=True):
                seen.setdefault(name, []).append((args[0].flatten(0, -2), part))
            return torch.cat(parts, dim=-1).view(made.shape)

        return hook

    def multiply(name: str, x: Tensor, product: Callable[[str, Tensor], Tensor]) -> Tensor:
        made = product(name, x)
        seen.setdefault(name, []).append((x, made))
        return made

    for unit in running.step.units:
        experts = running.experts.get(unit.name)
        holder = floats.holders.get(unit.name)
        if experts is not None:
            experts.product = lambda name, x, of=experts: multiply(name, x, of.multiply)  # type: ignore[misc]
        elif holder is not None:
            names = [part.name for part in holder.parts() if part.name in running.weights]
            if names:
                handles.append(floats.modules[unit.name].register_forward_hook(watch(names)))  # type: ignore[arg-type]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _replaced(running: FloatStep, changed: Mapping[str, Tensor]) -> Iterator[None]:
    """Put other weights in the place of a step's own, by layer name, for the time of a `with` block."""
    kept = {name: running.weights[name].clone() for name in changed}
    for name, weight in changed.items():
        running.weights[name].copy_(weight)
    try:
        yield
    finally:
        for name, weight in kept.items():
            running.weights[name].copy_(weight)
