"""Measure what decoding in blocks gains, and what it costs in quality, beside the model it was made from.

    python benchmarks/block_diffusion.py FOLDER [--thresholds 0.3 0.5 0.7 0.9 0.95 1] [--prompts 150] [--threads 1]

FOLDER: what examples/train_block_diffusion.py wrote. The autoregressive model beside it is the shipped one, which it
was trained from. Prompts are places in modules of the standard library that neither was trained on, of 92 to 99 tokens,
so that answers begin at every place of a block; answers are greedy, of 64 tokens, one request at a time, and the runs
take turns. Text quality is asked in two ways that do not share a fault:

- leading tokens: how many tokens of the answer equal the text that really follows, up to the first that differs;
- perplexity of the answer to the shipped model. Its own greedy answers are at an advantage, and so is text that repeats
  itself, whence the share of repeated 4-grams beside it.

The row "the text itself" says what either is for what people wrote. The script prints one table.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

import torch

import pymllm
from pymllm.engine.outputs import GenerationOutputs

MODULES = ("textwrap.py", "shlex.py", "calendar.py", "fractions.py", "sched.py", "statistics.py", "csv.py")
PROMPT_TOKENS, ANSWER_TOKENS = 92, 64


@dataclass
class Run:
    """One way to decode, the answers that it gave and what each round took."""

    name: str
    llm: pymllm.LLM
    params: pymllm.SamplingParams
    answers: list[list[int]] = field(default_factory=list)
    tokens_per_forward: float = 0.0
    throughputs: list[float] = field(default_factory=list)

    def decode(self, prompts: list[list[int]]) -> None:
        """Answer the prompts one after another."""
        self.answers = []
        rates, tokens, seconds = [], 0, 0.0
        for prompt in prompts:
            outputs = GenerationOutputs(1)
            [answer] = self.llm.generate([prompt], self.params, outputs=outputs)
            self.answers.append(list(answer.token_ids))
            rates.append(outputs.tpf)
            tokens += len(answer.token_ids)
            seconds += outputs.total_time
        self.tokens_per_forward = statistics.fmean(rates)
        self.throughputs.append(tokens / seconds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--thresholds", type=float, nargs="*", default=[0.3, 0.5, 0.7, 0.9, 0.95, 1.0])
    parser.add_argument("--prompts", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shipped = pymllm.LLM()
    blocks = pymllm.LLM(args.folder, strategy="block_diffusion")
    prompts, truths = held_out(shipped, args.prompts)
    greedy = {"max_tokens": ANSWER_TOKENS, "temperature": 0.0}
    runs = [Run("autoregressive, the shipped model", shipped, pymllm.SamplingParams(**greedy))]
    runs += [
        Run(
            f"block diffusion, threshold {threshold:g}",
            blocks,
            pymllm.SamplingParams(**greedy, confidence_threshold=threshold),
        )
        for threshold in args.thresholds
    ]
    for _ in range(args.rounds):
        for run in runs:
            run.decode(prompts)
    print(
        f"{len(prompts)} prompts, {args.threads} threads, {args.rounds} rounds; tokens a second: the median round\n\n"
        "| decoding | tokens a forward | tokens a second | leading tokens | perplexity | repeated 4-grams |\n"
        "| --- | --- | --- | --- | --- | --- |"
    )
    print(row("the text itself", "", "", truths, prompts, truths, shipped))
    for run in runs:
        speed = f"{statistics.median(run.throughputs):.0f}"
        rate = f"{run.tokens_per_forward:.2f}"
        print(row(run.name, rate, speed, run.answers, prompts, truths, shipped), flush=True)


def held_out(llm: pymllm.LLM, count: int) -> tuple[list[list[int]], list[list[int]]]:
    """Cut prompts and what follows them from the held-out modules, spread evenly."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    ids = llm.tokenizer.encode("\n".join((stdlib / name).read_text(encoding="utf-8") for name in MODULES))
    step = (len(ids) - PROMPT_TOKENS - 8 - ANSWER_TOKENS) // count
    prompts, truths = [], []
    for index in range(count):
        start = index * step
        end = start + PROMPT_TOKENS + index % 8
        prompts.append(ids[start:end])
        truths.append(ids[end : end + ANSWER_TOKENS])
    return prompts, truths


def row(
    name: str,
    rate: str,
    speed: str,
    answers: list[list[int]],
    prompts: list[list[int]],
    truths: list[list[int]],
    judge: pymllm.LLM,
) -> str:
    """Write one way's line of the table."""
    leading = statistics.fmean(
        leading_equal(answer, truth) for answer, truth in zip(answers, truths, strict=True)
    )
    nats = sum(nats_of(judge, prompt, answer) for prompt, answer in zip(prompts, answers, strict=True))
    perplexity = math.exp(nats / sum(map(len, answers)))
    repeated = statistics.fmean(map(repeated_share, answers))
    cells = (name, rate, speed, f"{leading:.2f}", f"{perplexity:.2f}", f"{repeated:.0%}")
    return f"| {' | '.join(cells)} |"


def leading_equal(answer: list[int], truth: list[int]) -> int:
    """Count the tokens of answer before the first that differs from truth."""
    for place, (found, expected) in enumerate(zip(answer, truth, strict=False)):
        if found != expected:
            return place
    return min(len(answer), len(truth))


def nats_of(judge: pymllm.LLM, prompt: list[int], answer: list[int]) -> float:
    """Sum the nats of answer after prompt to a causal model."""
    logits = judge.logits((prompt + answer)[:-1])[len(prompt) - 1 :]
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum"))


def repeated_share(answer: list[int]) -> float:
    """Return the share of 4-grams of answer that stood in it before."""
    grams = [tuple(answer[i : i + 4]) for i in range(len(answer) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


if __name__ == "__main__":
    main()
