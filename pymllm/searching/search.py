"""`search_rules`: the rules that harm a model least within so many bits a weight.

    print(pymllm.search_rules("org/model", 4.5).rules_file)

Each weight's harm under each method is estimated (`harm.py`), the least sum within the budget is found (`budget.py`),
and the choice's true divergence is measured on text that the estimates have not seen.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pymllm.arguments import checked
from pymllm.errors import ConfigError, choices, counted, nearest
from pymllm.loading.prepare import Prepared, prepare
from pymllm.loading.progress import progress_bar
from pymllm.parallel import Parallel
from pymllm.planning.make_plan import make_plan
from pymllm.quantization.converted import ConvertedLinearMethod
from pymllm.searching.budget import Choice, Option, least_bits, most_bits, solve
from pymllm.searching.harm import Passes
from pymllm.searching.journal import Journal, default_journal, digest, fingerprint
from pymllm.searching.methods import STORED, Method, read_methods
from pymllm.searching.result import ChosenWeight, CurvePoint, SearchResult
from pymllm.searching.rules_file import comment, write_rules
from pymllm.searching.weights import SearchedWeight, list_weights, plan_weight
from pymllm.text.windows import Windows, read_windows
from pymllm.weights.opening import resolve_model_path
from pymllm.writing.layers import Step
from pymllm.writing.quantize_checkpoint import SPELLINGS

TEXT = Path(__file__).with_name("text.txt")
HELD_OUT = 3  # of the windows of a text, every third is held out
POINTS = 6  # of the curve
BATCH = 4  # choices that are measured together


@checked()
def search_rules(
    model: str | Path,
    bits: float,
    *,
    text: str | Path | None = None,
    held_out: str | Path | None = None,
    methods: str | Iterable[str] | None = None,
    tokens: int = 2048,
    held_out_tokens: int = 1024,
    window: int = 256,
    keep_fused: bool = True,
    format: str | None = None,
    curve: bool = True,
    points: int = POINTS,
    seed: int = 0,
    journal: str | Path | None = None,
    restart: bool = False,
    revision: str | None = None,
    progress: bool | None = None,
) -> SearchResult:
    """Find the rules of least KL from the stored model, within a number of bits a weight.

    model: a folder of config.json and safetensors files, a .gguf file, or a hub id "org/name".
    bits: a weight, on average, at most: what a checkpoint stores for linear layers, experts, embedding and head.
    text: a file to estimate harms on; None: a text that comes with pymllm.
    held_out: a file to measure the result on; None: windows of `text` that harms are not estimated on.
    methods: to choose from, "int4:group_size=64,int8,none" or such methods in a list; "stored" leaves a weight as it
    is; None: integers of 2 to 8 bits, and stored.
    tokens: of `text`, to estimate harms on.
    held_out_tokens: to measure on.
    window: how many tokens are run together, as a text of its own.
    keep_fused: whether parts that run in one product (q, k and v) get one method, so that they still do.
    format: one that `pymllm quantize` writes, "compressed-tensors" say: what it cannot hold is not chosen; None: any
    method that runs.
    curve: whether to measure uniform choices and other budgets too.
    points: how many other budgets the curve has.
    seed: of the labels that are drawn for the estimates.
    journal: the file of measurements, from which a search that was stopped goes on; None: one below ~/.cache.
    restart: whether to throw the measurements of an earlier search away.
    revision: a branch, tag or commit of a hub id; None: its main branch.
    progress: whether to show a bar; None: on a terminal.

    The same arguments give the same rules.  Returns the `SearchResult`.
    Raises ConfigError for a budget below what any choice takes, or a method that is unknown; else what loading raises.
    """
    _check_bits(bits)
    with Parallel():
        prepared = prepare(
            resolve_model_path(model, revision), device="cpu", dtype="float32", compute="exact"
        )
        prepared.model.check_generates()
        chosen = read_methods(methods, prepared.config.dtype or torch.float32)
        with prepared.checkpoint:
            steps, weights, left = list_weights(prepared, keep_fused=keep_fused)
            fitted, measured = _read_text(prepared, text, held_out, tokens, held_out_tokens, window)
            about = {
                "model": fingerprint(prepared.checkpoint),
                "fitted": digest(repr(fitted).encode()),
                "held_out": digest(repr(measured).encode()),
                "parts": "fused" if keep_fused else "free",
                "seed": seed,
            }
            file = default_journal(about) if journal is None else Path(journal)
            options = _list_options(weights, chosen, format)
            table = [[bits_in for bits_in, _ in row] for row in options]
            _check_budget(weights, table, bits)
            with Journal(file, about, restart=restart) as notebook:
                search = _Search(prepared, steps, weights, options, fitted, measured, notebook, progress)
                search.estimate(chosen, seed)
                found = search.choose(bits)
                drawn = search.curve(chosen, bits, found, points) if curve else []
                kl, fitted_kl = search.measure([found])[0], search.measure([found], held_out=False)[0]
            named = TEXT.name if text is None else Path(text).name
            described = f"{named}, {digest(repr((fitted, measured)).encode())}"
            return _result(
                str(model), bits, search, found, kl, fitted_kl, drawn, described, left, chosen, format
            )


class _Search:
    """A search that is under way: its weights, and their options with what is known of them.

    options: of each weight, (bits, method) in the order of the methods.
    """

    def __init__(
        self,
        prepared: Prepared,
        steps: Sequence[Step],
        weights: Sequence[SearchedWeight],
        options: Sequence[Sequence[tuple[int, Method]]],
        fitted: Windows,
        measured: Windows,
        journal: Journal,
        progress: bool | None,
    ) -> None:
        self.prepared, self.steps, self.weights, self.options = prepared, steps, weights, options
        self.fitted, self.measured, self.journal, self.progress = fitted, measured, journal, progress
        self.count = sum(weight.count for weight in weights)
        self.known: list[list[Option]] = []
        self.kept: list[list[Method]] = []

    def estimate(self, methods: Sequence[Method], seed: int) -> None:
        """Estimate every harm that the journal does not have."""
        possible = {
            (weight.name, method.text)
            for weight, row in zip(self.weights, self.options, strict=True)
            for _, method in row
            if method.target is not None
        }

        def wanted(weight: SearchedWeight, method: Method) -> bool:
            key = weight.name, method.text
            return key in possible and _harm_key(*key) not in self.journal

        with self._bar("Estimating", 2) as advance:
            passes = Passes(self.prepared, self.steps, self.weights, self.fitted, advance)
            passes.estimate(
                methods,
                wanted,
                lambda weight, method, harm: self.journal.add(_harm_key(weight.name, method.text), harm),
                seed,
            )
        for weight, row in zip(self.weights, self.options, strict=True):
            harms = [
                0.0 if method.target is None else self.journal[_harm_key(weight.name, method.text)]
                for _, method in row
            ]
            usable = [k for k, harm in enumerate(harms) if harm < float("inf")]
            if not usable:
                raise ConfigError(
                    "no token of the text reaches this weight, and it cannot be left as it is stored",
                    code="search-methods",
                    tensor=weight.name,
                    expected=f"{STORED} among the methods, or a text that reaches it",
                )
            self.known.append([Option(row[k][0], harms[k]) for k in usable])
            self.kept.append([row[k][1] for k in usable])

    def choose(self, bits: float) -> Choice:
        """Find the choice of least estimated harm within a budget of bits a weight."""
        found = solve(self.known, int(bits * self.count))
        if found is None:
            least = least_bits(self.known) / self.count
            raise _too_few(bits, least)
        return found

    def methods_of(self, choice: Choice) -> dict[str, Method]:
        """Return the method of each weight, by its name."""
        return {
            weight.name: row[pick]
            for weight, row, pick in zip(self.weights, self.kept, choice.picks, strict=True)
        }

    def measure(self, choices: Sequence[Choice], *, held_out: bool = True) -> list[float]:
        """Measure the true KL of choices; what the journal has is not measured again."""
        named = [self.methods_of(choice) for choice in choices]
        keys = [_kl_key(one, held_out) for one in named]
        missing = {key: one for key, one in zip(keys, named, strict=True) if key not in self.journal}
        windows = self.measured if held_out else self.fitted
        todo = list(missing.items())
        batches = [todo[start : start + BATCH] for start in range(0, len(todo), BATCH)]
        with self._bar("Measuring", len(batches)) as advance:
            for batch in batches:
                passes = Passes(self.prepared, self.steps, self.weights, windows, advance)
                found = passes.divergences([one for _, one in batch])
                for (key, _), kl in zip(batch, found, strict=True):
                    self.journal.add(key, kl)
        return [self.journal[key] for key in keys]

    def curve(self, methods: Sequence[Method], bits: float, found: Choice, count: int) -> list[CurvePoint]:
        """Measure each method for all weights, where all can have it, and what other budgets give."""
        uniform: list[tuple[str, Choice]] = []
        for method in methods:
            picks = [next((k for k, one in enumerate(row) if one == method), None) for row in self.kept]
            if method.target is not None and None not in picks:
                uniform.append((method.text, self._choice([k for k in picks if k is not None])))
        low, high = (size(self.known) / self.count for size in (least_bits, most_bits))
        budgets = [low + (high - low) * step / max(count - 1, 1) for step in range(count)]
        searched = [(f"{bits:g} bits", found)]
        for budget in budgets:
            other = solve(self.known, round(budget * self.count))
            if other is not None and all(other.picks != known.picks for _, known in searched):
                searched.append((f"{budget:.3f} bits", other))
        everything = [*uniform, *searched]
        kls = self.measure([choice for _, choice in everything])
        points = [
            CurvePoint(name, index < len(uniform), choice.bits / self.count, -(-choice.bits // 8), kl)
            for index, ((name, choice), kl) in enumerate(zip(everything, kls, strict=True))
        ]
        return sorted(points, key=lambda point: (point.bytes, point.name))

    def _choice(self, picks: Sequence[int]) -> Choice:
        options = [row[pick] for row, pick in zip(self.known, picks, strict=True)]
        harm = sum(option.harm for option in options)
        return Choice(tuple(picks), sum(option.bits for option in options), harm, 0.0)

    def _bar(self, doing: str, passes: int) -> Any:
        nbytes = sum(step.nbytes for step in self.steps)
        return progress_bar(doing, passes * nbytes, self.progress if passes else False)


def _check_bits(bits: float) -> None:
    if isinstance(bits, bool) or not isinstance(bits, (int, float)) or not 0 < bits <= 64:
        raise ConfigError(
            "the budget is no number of bits a weight",
            code="search-budget",
            expected="a number above 0, such as 4.5",
            found=repr(bits),
        )


def _read_text(
    prepared: Prepared,
    text: str | Path | None,
    held_out: str | Path | None,
    tokens: int,
    held_out_tokens: int,
    window: int,
) -> tuple[Windows, Windows]:
    """Read the windows to estimate harms on, and those to measure on."""
    file = TEXT if text is None else Path(text)
    if held_out is not None:
        other = read_windows(prepared.checkpoint, prepared.config, Path(held_out), held_out_tokens, window)
        return read_windows(prepared.checkpoint, prepared.config, file, tokens, window), other
    windows = read_windows(prepared.checkpoint, prepared.config, file, tokens + held_out_tokens, window)
    apart = windows[HELD_OUT - 1 :: HELD_OUT]
    others = tuple(one for index, one in enumerate(windows) if index % HELD_OUT != HELD_OUT - 1)
    if not apart:
        raise ConfigError(
            "there is too little text to hold some of it out",
            code="text",
            file=str(file),
            expected=f"{counted(HELD_OUT, 'window')} of {window} tokens",
            found=f"{counted(sum(map(len, windows)), 'token')}",
            fix="Take a longer text or more tokens, shorter windows (--window), or another text to measure on "
            "(--held-out).",
        )
    return others, apart


def _list_options(
    weights: Sequence[SearchedWeight], methods: Sequence[Method], format: str | None
) -> list[list[tuple[int, Method]]]:
    """List what each weight can be, with its bits.  ConfigError for a weight that can be nothing."""
    if format is not None and format not in SPELLINGS:
        raise ConfigError(
            "unknown format to write",
            code="spelling",
            expected=choices(SPELLINGS, format),
            found=format,
            fix=nearest(str(format), SPELLINGS),
        )
    found = []
    for weight in weights:
        row = []
        for method in methods:
            bits = weight.bits_in(method)
            if bits is not None and (format is None or _writable(weight, method, format)):
                row.append((bits, method))
        if not row:
            raise ConfigError(
                "none of the methods can hold this weight",
                code="search-methods",
                tensor=weight.name,
                expected=f"a method for {weight.layers[0].shape.in_features} inputs"
                + ("" if format is None else f" that {format} can hold"),
                found=", ".join(map(str, methods)),
                fix=f"Add {STORED}, which leaves a weight as it is, or a smaller group_size.",
            )
        found.append(row)
    return found


def _writable(weight: SearchedWeight, method: Method, format: str) -> bool:
    """Tell whether a format that `pymllm quantize` writes can hold a weight in a method."""
    spelling = SPELLINGS[format]()
    for layer in weight.layers:
        try:
            made = (
                layer.source.planned(layer.shape)
                if method.target is None
                else plan_weight(method.target, layer.shape)
            )
            spelling.store(made, layer.shape, layer.kind)
        except ConfigError:
            return False
    return True


def _check_budget(weights: Sequence[SearchedWeight], table: Sequence[Sequence[int]], bits: float) -> None:
    """Refuse a budget that the smallest methods exceed, before anything is measured."""
    count = sum(weight.count for weight in weights)
    least = sum(map(min, table))
    if least > int(bits * count):
        raise _too_few(bits, least / count)


def _too_few(bits: float, least: float) -> ConfigError:
    return ConfigError(
        "no choice of these methods takes so few bits",
        code="search-budget",
        expected=f"at least {least:.4f} bits a weight",
        found=f"{bits:g}",
        fix="Raise --bits, or add smaller methods (--methods int2:group_size=64,...).",
    )


def _harm_key(weight: str, method: str) -> str:
    return f"harm {weight} {method}"


def _kl_key(methods: Mapping[str, Method], held_out: bool) -> str:
    named = json.dumps({name: method.text for name, method in methods.items()}, sort_keys=True)
    return f"kl {'held out' if held_out else 'fitted'} {digest(named.encode())}"


def _result(
    model: str,
    bits: float,
    search: _Search,
    choice: Choice,
    kl: float,
    fitted_kl: float,
    points: list[CurvePoint],
    text: str,
    left: Sequence[Any],
    methods: Sequence[Method],
    format: str | None,
) -> SearchResult:
    """Put a result together, and check that loading by its rules would give just this choice."""
    by_weight = search.methods_of(choice)
    chosen: list[ChosenWeight] = []
    texts: dict[str, str] = {}
    for weight, row, pick in zip(search.weights, search.known, choice.picks, strict=True):
        method, option = by_weight[weight.name], row[pick]
        # Floats that stay floats need no rule.
        text_of = STORED if weight.plain and method.text == "none" else method.text
        texts |= dict.fromkeys(weight.names, text_of)
        chosen.append(
            ChosenWeight(list(weight.names), text_of, weight.count, option.bits / weight.count, option.harm)
        )
    rules = write_rules(texts)
    _check_rules(search.prepared, rules, texts)
    planned = make_plan(prepare(search.prepared.checkpoint.path, rules, device="cpu"))
    writes = [
        name
        for name in SPELLINGS
        if all(_writable(weight, by_weight[weight.name], name) for weight in search.weights)
    ]
    notes = []
    fixed = [
        w for w, row in zip(search.weights, search.kept, strict=True) if [m.text for m in row] == [STORED]
    ]
    if fixed:
        notes.append(f"{counted(len(fixed), 'weight')} can only stay as stored: {fixed[0].name}")
    if left:
        notes.append(f"{len(left)} routers stay as they are stored")
    if kl > 2 * choice.harm + 1e-6:
        notes.append(
            "the measured KL is more than twice the estimate: at so few bits, errors of layers do not simply add up"
        )
    size, of_all = choice.bits / search.count, sum(weight.count for weight in search.weights)
    fitted_tokens, held_tokens = (sum(map(len, windows)) for windows in (search.fitted, search.measured))
    everything = sum(tensor.nbytes for tensor in search.prepared.checkpoint.tensors.values())
    head = comment(
        f"Rules for {model}, by `pymllm search --bits {bits:g}`.",
        f"{size:.4f} bits a weight as stored (codes, scales, zero points) over {counted(of_all, 'weight')}: "
        f"{counted(-(-choice.bits // 8), 'byte')}.",
        f"Expected KL from the stored weights: {kl:.4g} nats a token, on {held_tokens} held-out tokens "
        f"(estimated {choice.harm:.4g}).",
        f"Text: {text}; {counted(fitted_tokens, 'token')} to estimate on.",
        "Methods: "
        + ", ".join(map(str, methods))
        + ("." if format is None else f"; as {format} holds them."),
        "What no rule names stays as it is stored.  `pymllm quantize` can write this as: "
        + (", ".join(writes) or "no format that it knows")
        + ".",
    )
    return SearchResult(
        model=model,
        budget=bits,
        bits=size,
        weights=of_all,
        bytes=-(-choice.bits // 8),
        packed_bytes=planned.totals["weight_bytes"],
        kept_bytes=everything - sum(weight.stored_bits for weight in search.weights) // 8,
        estimate=choice.harm,
        bound=choice.bound,
        kl=kl,
        fitted_kl=fitted_kl,
        fitted_tokens=fitted_tokens,
        held_out_tokens=held_tokens,
        text=text,
        rules=rules,
        rules_file="\n".join([*head, *rules]) + "\n",
        chosen=chosen,
        curve=points,
        kernels=dict(
            Counter(layer.kernel for layer in planned.layers if layer.kind not in ("attention", "recurrence"))
        ),
        writes=writes,
        notes=notes,
    )


def _check_rules(prepared: Prepared, rules: Sequence[str], texts: Mapping[str, str]) -> None:
    """Assert that rules give every layer what was chosen for it, and touch no other."""
    decisions = prepare(
        prepared.checkpoint.path, rules, device="cpu", dtype="float32", compute="exact"
    ).quant.decisions
    for name, decision in decisions.items():
        rule = None if decision.rule is None else str(decision.rule).removeprefix(f"{decision.rule.pattern}=")
        expected = texts.get(name, STORED)
        same = rule is None if expected == STORED else rule == expected
        assert same, f"{name}: {rule} instead of {expected}"
        converts = isinstance(decision.method, ConvertedLinearMethod)
        assert rule is None or converts or decision.method.name == expected.partition(":")[0], name
