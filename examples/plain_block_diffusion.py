"""How a block-diffusion model of Fast-dLLM v2's kind attends and is decoded, in plain torch, and how good its text is.

Nothing here is pymllm's, so that it can say whether what pymllm decodes is right.  Every forward runs the whole
sequence.

A block sees itself and the earlier blocks.  The logits at a position say what stands at the next one, as an
autoregressive model's do.  The first token of a block comes from the last logits of the block before it; the others
begin as masks.

Shapes: R sequences, T tokens of each, B block length, C copies of a sequence side by side, V vocabulary.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

SMALL_BLOCK_LENGTH = 8  # Fast-dLLM v2's own
THRESHOLDS = (0.3, 0.5, 0.7, 0.9, 0.95, 1.0)
PROMPT_TOKENS, ANSWER_TOKENS = 92, 64  # an answer begins inside a block


def seen_by_blocks(length: int, block_length: int, copies: int) -> Tensor:
    """Say which keys each query sees when copies of a sequence stand side by side; the first copy is the clean one.

    A query sees its own block in its own copy, and the earlier blocks of the clean copy.  With one copy this is
    the block-causal attention of decoding.  Returns [copies * length, copies * length] bool, queries first.
    """
    positions = torch.arange(copies * length)
    copy, block = positions // length, positions % length // block_length
    own = (copy[:, None] == copy) & (block[:, None] == block)
    return own | ((copy == 0) & (block < block[:, None]))


def side_by_side(copies: list[Tensor], block_length: int) -> dict[str, Tensor]:
    """Return what the model's forward takes to run copies, C times [R, T], side by side."""
    length = copies[0].shape[1]
    return {
        "input_ids": torch.cat(copies, 1),
        "position_ids": torch.arange(length).repeat(len(copies))[None],
        "attention_mask": seen_by_blocks(length, block_length, len(copies))[None, None],
    }


def predict(model: LlamaForCausalLM, copies: list[Tensor], block_length: int, wanted: Tensor) -> Tensor:
    """Run copies, C times [R, T], side by side; return the logits of the wanted positions, [R, C * T] bool, float32.

    The mask token is never proposed: its logit is -inf.
    """
    hidden = model.model(**side_by_side(copies, block_length), use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[wanted]).float()
    barred = torch.zeros(logits.shape[1], dtype=torch.bool)
    barred[model.config.mask_token_id] = True
    return logits.masked_fill(barred, -math.inf)


def shifted_left(mask: Tensor) -> Tensor:
    """Return [R, T] bool: the positions whose logits say what stands at those of mask, one before each."""
    return nn.functional.pad(mask[:, 1:], (0, 1))


@torch.no_grad()
def left_to_right_loss(model: LlamaForCausalLM, tokens: Tensor, block_length: int) -> float:
    """Compute the nats a token of tokens [R, T] when each is predicted from those before it, masks to its block's end.

    One token at a time is what decoding does at threshold 1 when the leftmost is the surest; by the chain rule the
    sum is a likelihood of the text, comparable with an autoregressive model's.
    """
    in_block = torch.arange(tokens.shape[1]) % block_length
    copies, wanted = [tokens], []
    for place in range(block_length):
        here = (in_block == place).expand(tokens.shape).clone()
        here[:, 0] = False  # nothing comes before it
        wanted.append(here)
        if place:
            copies.append(tokens.masked_fill(in_block >= place, model.config.mask_token_id))
    total = 0.0
    for sequence in range(len(tokens)):
        here = [mask[sequence : sequence + 1] for mask in wanted]
        logits = predict(
            model,
            [copy[sequence : sequence + 1] for copy in copies],
            block_length,
            torch.cat([shifted_left(mask) for mask in here], 1),
        )
        targets = torch.cat([tokens[sequence : sequence + 1][mask] for mask in here])
        total += float(nn.functional.cross_entropy(logits, targets, reduction="sum"))
    return total / (tokens.shape[0] * (tokens.shape[1] - 1))


@torch.no_grad()
def autoregressive_loss(model: LlamaForCausalLM, tokens: Tensor) -> float:
    """Compute the nats a token of tokens [R, T] of a causal model."""
    total = 0.0
    for sequence in tokens.split(8):
        logits = model(input_ids=sequence[:, :-1], use_cache=False).logits
        total += float(
            nn.functional.cross_entropy(logits.flatten(0, 1), sequence[:, 1:].flatten(), reduction="sum")
        )
    return total / (tokens.shape[0] * (tokens.shape[1] - 1))


@dataclass
class Completion:
    """What decoding made of a prompt.

    forwards: those after the prompt was read.  decoded: the tokens that they gave, all but a first one that came from
    reading the prompt.
    """

    tokens: list[int]
    forwards: int
    decoded: int


@torch.no_grad()
def decode_blocks(
    model: LlamaForCausalLM, prompt: list[int], max_tokens: int, threshold: float, block_length: int
) -> Completion:
    """Decode as Fast-dLLM v2 does, greedily and plainly: every forward runs the whole sequence."""
    masked, ends = model.config.mask_token_id, set(model.generation_config.eos_token_id)
    small = min(SMALL_BLOCK_LENGTH, block_length)
    tokens, limit = list(prompt), len(prompt) + max_tokens
    forwards = 0

    def propose(positions: list[int]) -> tuple[Tensor, Tensor]:
        wanted = torch.zeros(1, len(tokens), dtype=torch.bool)
        wanted[0, [position - 1 for position in positions]] = True
        probabilities = predict(model, [torch.tensor([tokens])], block_length, wanted).softmax(-1)
        return probabilities.max(-1)

    def finished() -> bool:
        for token in tokens[len(prompt) : limit]:
            if token == masked or token in ends:
                return token != masked
        return len(tokens) >= limit

    def append_first() -> None:
        tokens.append(masked)
        tokens[-1] = int(propose([len(tokens) - 1])[1])

    from_prompt = len(prompt) % block_length == 0
    if from_prompt:
        append_first()
    while not finished():
        start = len(tokens) // block_length * block_length
        tokens += [masked] * (start + block_length - len(tokens))
        for low in range(start, start + block_length, small):
            while not finished() and masked in tokens[low : low + small]:
                positions = [p for p in range(low, low + small) if tokens[p] == masked]
                confidence, proposed = propose(positions)
                forwards += 1
                accepted = confidence > threshold
                accepted[confidence.argmax()] |= not accepted.any()
                for index in accepted.nonzero().flatten().tolist():
                    tokens[positions[index]] = int(proposed[index])
        if not finished():
            forwards += 1
            append_first()
    filled = sum(token != masked for token in tokens[len(prompt) : limit])
    answer = tokens[len(prompt) : limit]
    end = next((place + 1 for place, token in enumerate(answer) if token in ends), len(answer))
    return Completion(answer[:end], forwards, filled - from_prompt)


@torch.no_grad()
def decode_causally(model: LlamaForCausalLM, prompt: list[int], max_tokens: int) -> Completion:
    """Decode a causal model greedily: one token a forward, the first from reading the prompt."""
    ends = set(model.generation_config.eos_token_id)
    tokens, cache = [], None
    feed = torch.tensor([prompt])
    while len(tokens) < max_tokens and not (tokens and tokens[-1] in ends):
        output = model(input_ids=feed, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        tokens.append(int(output.logits[0, -1].argmax()))
        feed = torch.tensor([tokens[-1:]])
    return Completion(tokens, len(tokens) - 1, len(tokens) - 1)


def leading_equal(answer: list[int], truth: list[int]) -> int:
    """Count the tokens of answer before the first that differs from truth."""
    pairs = zip(answer, truth, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(answer), len(truth)))


@torch.no_grad()
def nats_of(judge: LlamaForCausalLM, prompt: list[int], answer: list[int]) -> float:
    """Sum the nats of answer after prompt to a causal model."""
    tokens = torch.tensor([prompt + answer])
    logits = judge(input_ids=tokens[:, :-1], use_cache=False).logits[0, len(prompt) - 1 :]
    return float(nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum"))


def decoding_report(
    model: LlamaForCausalLM, base: LlamaForCausalLM, tokens: Tensor, prompts: int, block_length: int
) -> list[dict[str, object]]:
    """Complete prompts from a text, [tokens], with the block model, at THRESHOLDS, and with the causal base model.

    prompts: how many of them, of PROMPT_TOKENS tokens each, spread evenly.  The perplexity is that of the answer to the
    base model, so the base model's own greedy answers are at an advantage, and so are repetitions.
    """
    span = PROMPT_TOKENS + ANSWER_TOKENS
    pieces = tokens[: len(tokens) // span * span].view(-1, span)
    pieces = pieces[:: max(1, len(pieces) // prompts)][:prompts].tolist()
    runs: dict[str, Callable[[list[int]], Completion]] = {
        "the text itself": lambda prompt: Completion([], 0, 0),
        "autoregressive": lambda prompt: decode_causally(base, prompt, ANSWER_TOKENS),
    }
    for threshold in THRESHOLDS:
        runs[f"block diffusion, threshold {threshold}"] = lambda prompt, threshold=threshold: decode_blocks(
            model, prompt, ANSWER_TOKENS, threshold, block_length
        )
    rows = []
    for name, decode in runs.items():
        rates, leading, nats, count = [], 0, 0.0, 0
        for piece in pieces:
            prompt, truth = piece[:PROMPT_TOKENS], piece[PROMPT_TOKENS:]
            completion = decode(prompt)
            if completion.forwards:
                rates.append(completion.decoded / completion.forwards)
            answer = completion.tokens or truth
            leading += leading_equal(answer, truth)
            nats += nats_of(base, prompt, answer)
            count += len(answer)
        rows.append(
            {
                "decoding": name,
                "tokens_per_forward": round(sum(rates) / len(rates), 3) if rates else None,
                "leading_tokens_as_in_the_text": round(leading / len(pieces), 3),
                "perplexity_to_the_autoregressive_model": round(math.exp(nats / count), 3),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows
