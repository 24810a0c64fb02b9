"""Block diffusion written plainly: every forward runs the whole text, one request, nothing kept between forwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pymllm import SamplingParams
from pymllm.engine.choosing import uniform
from pymllm.kernels.aten.sampling import TorchSampling
from pymllm.kernels.sampling import SETTINGS, SamplingBatch


@dataclass
class Plain:
    """The decoder of a model.

    forward: gives the logits [T, V] of a text.  small: the small blocks' length; None: the logits are not shifted.

    After `decode`: steps and commits, how many forwards filled or edited a block, and how many blocks were left behind;
    chances: log-probabilities of the answer; margin: how far the closest decision was from going another way.
    """

    forward: Callable[[list[int]], Tensor]
    length: int
    mask: int
    ends: set[int]
    threshold: float
    small: int | None = None

    def decode(self, prompt: list[int], params: SamplingParams) -> tuple[list[int], str]:
        self.steps = self.commits = self.drawn = 0
        self.margin, self.params = 1.0, params
        self.chances: dict[int, float] = {}
        self.text, self.read = list(prompt), len(prompt)
        self.over = set(params.stop_token_ids) | (set() if params.ignore_eos else self.ends)
        while True:
            if len(self.text) % self.length == 0:
                self.commits += len(self.text) > self.read
                if self.small:
                    self.put(self.propose([len(self.text)]))
            start = len(self.text) // self.length * self.length
            if self.end() is None:
                self.text += [self.mask] * (start + self.length - len(self.text))
                self.fill(start)
            if (end := self.end()) is not None:
                return end

    def end(self) -> tuple[list[int], str] | None:
        """The answer and its reason, if everything up to its end is there."""
        answer = self.text[self.read : self.read + (self.params.max_tokens or 10**9)]
        for count, token in enumerate(answer, 1):
            if token == self.mask:
                return None
            if token in self.over:
                return answer[:count], "stop"
        return (answer, "length") if len(answer) == self.params.max_tokens else None

    def fill(self, start: int) -> None:
        params, edits = self.params, self.params.edit_threshold is not None
        step = after = 0
        while True:
            open_ = [p for p in range(start, start + self.length) if self.text[p] == self.mask]
            least = 1
            if self.small:
                open_ = [p for p in open_ if p // self.small == open_[0] // self.small]
            else:
                steps = params.denoising_steps or self.length
                least = self.length // steps + (1 if step < self.length % steps else 0)
            after += not open_
            most = 16 if params.max_post_edit_steps is None else params.max_post_edit_steps
            if not open_ and (not edits or after > most):
                return
            own = [p for p in range(max(start, self.read), start + self.length) if p not in open_]
            found = self.propose(sorted(open_ + (own if edits else [])))
            self.steps += 1
            step += 1
            chosen = self.choose({p: found[p] for p in open_}, least)
            if edits:
                for p in own:
                    self.margin = min(self.margin, abs(found[p][1] - params.edit_threshold))
                chosen += [
                    p for p in own if found[p][0] != self.text[p] and found[p][1] > params.edit_threshold
                ]
            self.put({p: found[p] for p in chosen})
            if not chosen or (not edits and self.end() is not None):
                return

    def choose(self, found: dict[int, tuple[int, float, float]], least: int) -> list[int]:
        if self.params.remasking == "sequential":
            return sorted(found)[:least]
        best = sorted(found, key=lambda p: (-found[p][1], p))
        static = self.params.remasking == "low_confidence_static"
        threshold = 2.0 if static else self.params.confidence_threshold or self.threshold
        self.margin = min([self.margin, *(abs(found[p][1] - threshold) for p in found)])
        sure = [p for p in found if found[p][1] > threshold]
        if len(sure) >= least:
            return sure
        if len(best) > least:
            self.margin = min(self.margin, found[best[least - 1]][1] - found[best[least]][1])
        return best[:least]

    def put(self, chosen: dict[int, tuple[int, float, float]]) -> None:
        for p, (token, _, chance) in chosen.items():
            self.text[p : p + 1] = [token]
            self.chances[p] = chance

    def propose(self, places: list[int]) -> dict[int, tuple[int, float, float]]:
        """A token of each place, its probability by which it is chosen, and its log-probability by the model."""
        logits = self.forward(self.text).float()
        found = {}
        for p in places:
            row = logits[p - 1 if self.small else p].clone()
            row[self.mask] = -torch.inf
            own = row.log_softmax(-1)
            if 0 <= p - self.read < self.params.min_tokens:
                row[list(self.over)] = -torch.inf
            if self.params.greedy:
                best = row.softmax(-1).topk(2)
                token, chance = best.indices[0].item(), best.values[0].item()
                self.margin = min(self.margin, chance - best.values[1].item())
            else:
                token, chance = self.draw(row)
            found[p] = token, chance, own[token].item()
        return found

    def draw(self, row: Tensor) -> tuple[int, float]:
        """Draw the next token that chance decides; its probability among what top_k and top_p leave."""
        params = self.params
        weights = (row / params.temperature).softmax(-1)
        if params.top_k:
            weights[weights < weights.topk(min(params.top_k, len(row))).values[-1]] = 0
        order = weights.argsort(descending=True)
        before = weights[order].cumsum(0) - weights[order]
        weights[order[before >= params.top_p * weights.sum()]] = 0
        own = {"temperature": 1.0, "top_p": 1.0, "typical_p": 1.0, "repetition_penalty": 1.0}
        own["number"] = uniform(params.seed, self.drawn)
        self.drawn += 1
        none = torch.zeros(2, dtype=torch.int64), torch.empty(0, dtype=torch.int64), torch.empty(0)
        settings = torch.tensor([[own.get(name, 0.0) for name in SETTINGS]], dtype=torch.float64)
        token = int(TorchSampling().choose(weights.log()[None], SamplingBatch(settings, *none, *none)))
        return token, (weights[token] / weights.sum()).item()
