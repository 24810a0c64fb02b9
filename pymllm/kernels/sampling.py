"""The contract of sampling kernels: what a request's settings do to its logits, and how a token is drawn from them.

The order is that of vLLM (its sampler of version 1), and typical_p comes after it, where transformers has it:

1. `bias` is added to the logits it names: logit_bias, and minus infinity for what must not come (bad words, end tokens
   before min_tokens).
2. Penalties, over the tokens that the text has: repetition (of prompt and answer) divides a positive logit and
   multiplies another one; frequency times the token's count in the answer, and presence where it is there at all, are
   subtracted.
3. temperature 0 takes the highest logit. Any other divides the logits: x = (logit - highest) / temperature.
4. min_p keeps the tokens at least so many times as likely as the likeliest; top_k those at least as likely as the k-th.
5. top_p, of what is left: the likeliest tokens, one after the other, until they have so much of the probability.
6. typical_p, of what is left: the tokens whose information is nearest to its expectation, until they have that much.
7. The token is drawn from what is left, by its probability. Pieces of PIECE tokens race, then the tokens of the
   piece that wins: an entrant of the weight w arrives after the time -log(u) / w, where u follows from the row's
   number and the entrant's index alone, and the first one wins. So the last bit of a logit changes a draw only where
   two arrive together, which neither running sums nor any order of the tokens could promise.

Of equal logits the lower token comes first; those equal to the k-th, or as near as the last typical one, all stay.
The likeliest token outlives steps 4 and 5.
"""

# R rows, V vocabulary, B biases of all rows, S seen tokens of all rows, N likeliest tokens

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from pymllm.kernels.hardware import Device

# The columns of `SamplingBatch.settings`; kernels/sampling.h has the same order. top_k 0 keeps all. number: in [0, 1),
# of 53 bits; all chance of the row follows from it.
SETTINGS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "number",
)

# So many tokens lie in a piece of a row: kPiece in kernels/sampling.h.
PIECE = 64

# exp of less than this counts as 0, so that no token is drawn that was cut off.
LEAST_EXPONENT = -87.0


@dataclass(frozen=True)
class SamplingProblem:
    """The choice of tokens from logits, on a device."""

    device: Device


@dataclass(frozen=True)
class SamplingBatch:
    """The settings of the rows of one step, on the CPU.

    settings: [R, len(SETTINGS)] float64.
    bias_starts: [R + 1] int64, where each row begins in bias_tokens [B] int64 and bias_values [B] float32.
    seen_starts: likewise in seen_tokens [S] int64, each token of a row once, and seen_counts [S] float32, how often the
    answer has it. Rows without penalties have none.
    """

    settings: Tensor
    bias_starts: Tensor
    bias_tokens: Tensor
    bias_values: Tensor
    seen_starts: Tensor
    seen_tokens: Tensor
    seen_counts: Tensor


class SamplingKernel(Protocol):
    """A kernel that chooses the next token of each row.  A row's result does not depend on the rows beside it."""

    name: str

    def why_not(self, problem: SamplingProblem) -> str | None: ...

    def choose(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        """Choose a token of each row, as the module says.

        logits: [R, V], any float dtype; they stay as they are.  Returns [R] int64 on their device, -1 for a row with
        NaN or infinity, or in which no token is left.  Two kernels draw the same token, unless two arrive within
        float32 rounding of each other.
        """

    def propose(self, logits: Tensor, batch: SamplingBatch) -> tuple[Tensor, Tensor]:
        """Choose as `choose` does, and tell how likely each token was.

        Returns the tokens, and [R] float64: the probability of a drawn token among those it was drawn from, by step 7,
        and of a likeliest one (temperature 0) among all, after steps 1 and 2; NaN where there is no token.
        """

    def log_probabilities(self, logits: Tensor, tokens: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the log-probabilities of the logits as they are: those of `tokens`, and the `count` highest.

        logits: [R, V].  tokens: [R] int64, inside the vocabulary.
        Returns [R] float32, the likeliest tokens [R, N] int64, best first, and theirs, [R, N] float32; N is `count`, or
        V if that is less.  All are NaN, and the tokens 0, in a row with NaN or infinity.
        """
