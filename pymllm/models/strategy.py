"""How a checkpoint's answers are decoded: the strategy, its settings, and where each of them came from.

The strategies themselves are in `pymllm/engine/strategies`. What is decided here decides how texts are read, so it is
known before a model is built: attention by blocks needs other kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pymllm.errors import ConfigError, nearest, unknown_name

# By strategy, its settings and what kind each is.
STRATEGIES: dict[str, dict[str, type]] = {
    "autoregressive": {},
    "block_diffusion": {"block_length": int, "small_block_length": int, "mask_token_id": int},
    "prompt_lookup": {"drafts": int, "longest": int, "shortest": int},
    "draft_model": {"path": str, "drafts": int},
}

# What the strategies that draft do where nobody says otherwise: prompt_lookup drafts at most so many tokens after the
# longest of the last `longest` to `shortest` tokens that the text has had before.
DRAFTING = {"drafts": 3, "longest": 4, "shortest": 2}
# A run of a drafted step, the last token included, fills at most one page more.
MOST_DRAFTS = 15
LONGEST_LOOKUP = 16

# What config.json may call the block length.
BLOCK_LENGTHS = ("block_size", "bd_size", "block_length")
SMALL_BLOCK = 8


@dataclass(frozen=True)
class BlockDiffusion:
    """The settings of a family that is decoded block by block, for what its checkpoints do not say.

    block_length: tokens of a block.  mask_token_id: the token that stands at open positions.
    confidence_threshold: a proposed token is accepted above this probability.
    shifted: whether the logits at a position say what stands at the next one, as an autoregressive model's do.
    """

    block_length: int
    mask_token_id: int
    confidence_threshold: float
    shifted: bool = False


@dataclass(frozen=True)
class Strategy:
    """The strategy that an engine decodes with.

    settings: by name, all of them.  sources: where each came from, for people.
    family: what the model's family takes for granted of block diffusion; None: it was not trained for that.
    notes: what a user should know of the choice.
    draft: the second model of draft_model, a `LanguageModel`, once it is loaded.
    """

    name: str = "autoregressive"
    settings: Mapping[str, Any] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    family: BlockDiffusion | None = None
    notes: tuple[str, ...] = ()
    draft: Any = field(default=None, repr=False, compare=False)

    @property
    def block_length(self) -> int:
        """The number of tokens that see one another; 1: each sees what came before it."""
        return int(self.settings["block_length"]) if self.name == "block_diffusion" else 1

    @property
    def drafts(self) -> int:
        """The most tokens that are drafted; 0: none ever."""
        return int(self.settings.get("drafts", 0))

    @property
    def widths(self) -> tuple[int, ...]:
        """The numbers of tokens that each request of a decoding step may have, the most last."""
        return (1, 1 + self.drafts) if self.drafts else (self.block_length,)

    def __str__(self) -> str:
        settings = (f"{key} {value} ({self.sources[key]})" for key, value in self.settings.items())
        return ", ".join((self.name, *settings))


def parse_strategy(spec: str) -> tuple[str, dict[str, Any]]:
    """Read "name[:key=value,...]".  A path may have commas.

    ConfigError for a strategy, a setting or a value that there is not.
    """
    name, _, rest = str(spec).strip().partition(":")
    if name not in STRATEGIES:
        raise unknown_name("strategy", name, list(STRATEGIES), code="strategy")
    known, settings, last = STRATEGIES[name], dict[str, Any](), ""
    for part in filter(None, (part.strip() for part in rest.split(","))):
        key, equals, value = (word.strip() for word in part.partition("="))
        if known.get(last) is str and not equals and key not in known:
            settings[last] += f",{part}"
            continue
        if key not in known or not equals or key in settings:
            raise ConfigError(
                f"the strategy {name} has no setting {part!r}"
                if key not in known
                else f"{key} is named twice"
                if key in settings
                else "a setting has no value",
                code="strategy",
                tensor=name,
                expected=", ".join(f"{setting}=VALUE" for setting in known) or "no settings",
                found=repr(part),
                fix=nearest(key, known),
            )
        settings[key], last = _value(name, key, value, known[key]), key
    return name, settings


def choose_strategy(
    spec: str | None,
    family: BlockDiffusion | None,
    config: Mapping[str, Any],
    generation_config: Mapping[str, Any],
    vocabulary: int,
    find_mask_token: Callable[[], int | None],
) -> Strategy:
    """Choose the strategy of a checkpoint, and its settings.

    spec: what the user asked for, as `parse_strategy` reads it; None: what the model was trained for.
    family: what its family takes for granted.  config, generation_config: the checkpoint's files.
    vocabulary: the number of tokens.  find_mask_token: finds the tokenizer's mask token.
    ConfigError for settings that do not fit.
    """
    name, asked = parse_strategy(spec or ("autoregressive" if family is None else "block_diffusion"))
    notes: tuple[str, ...] = ()
    if name != "block_diffusion":
        if family is not None:
            notes = (f"the model was trained for block_diffusion; as asked, it is decoded by {name}",)
        chosen = _choose_drafting(name, asked)
        where = {key: "as asked" if key in asked else "the usual" for key in chosen}
        return Strategy(name, chosen, where, None, notes)
    settings: dict[str, int] = {}
    sources: dict[str, str] = {}

    def settle(key: str, *found: tuple[Any, str]) -> None:
        for value, source in ((asked.get(key), "as asked"), *found):
            if value is not None:
                settings[key], sources[key] = _integer(key, value, source), source
                return
        raise ConfigError(
            f"block_diffusion needs {key}, which the checkpoint does not say",
            code="strategy",
            tensor=key,
            expected=f"--strategy block_diffusion:{key}=N",
        )

    usual = "as is usual in its family"
    lengths = [(config.get(key), f"{key} of config.json") for key in BLOCK_LENGTHS]
    settle("block_length", *lengths, (family and family.block_length, usual))
    length = settings["block_length"]
    if family is None or family.shifted:
        fitting = max(b for b in range(1, min(SMALL_BLOCK, length) + 1) if length % b == 0)
        settle("small_block_length", (fitting, "the usual"))
    elif "small_block_length" in asked:
        raise ConfigError(
            "this model's blocks are decoded as a whole, so it has no use for small_block_length",
            code="strategy",
            tensor="small_block_length",
            fix="Leave it out.",
        )
    if length % settings.get("small_block_length", 1):
        raise ConfigError(
            "small_block_length must divide block_length",
            code="strategy",
            tensor="small_block_length",
            expected=f"a divisor of {length}",
            found=str(settings["small_block_length"]),
        )
    settle(
        "mask_token_id",
        (config.get("mask_token_id"), "mask_token_id of config.json"),
        (generation_config.get("mask_token_id"), "mask_token_id of generation_config.json"),
        (None if "mask_token_id" in asked else find_mask_token(), "the tokenizer's mask token"),
        (family and family.mask_token_id, usual),
    )
    if settings["mask_token_id"] >= vocabulary:
        raise ConfigError(
            "the mask token lies outside the vocabulary",
            code="strategy",
            tensor="mask_token_id",
            expected=f"0 to {vocabulary - 1}",
            found=f"{settings['mask_token_id']}, {sources['mask_token_id']}",
            fix="Name it: --strategy block_diffusion:mask_token_id=N.",
        )
    if family is None:
        notes = ("the model was not trained for block_diffusion, by which it is decoded as asked",)
    return Strategy(name, settings, sources, family, notes)


def _choose_drafting(name: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in and check the settings of a strategy that has no blocks."""
    settings = {key: asked.get(key, DRAFTING.get(key)) for key in STRATEGIES[name]}
    if not settings.get("path", "any"):
        raise ConfigError(
            "draft_model needs the model that drafts",
            code="strategy",
            tensor="path",
            expected="--strategy draft_model:path=MODEL, a smaller one with the same tokenizer",
        )
    longest = settings.get("longest", LONGEST_LOOKUP)
    if "shortest" in settings and "shortest" not in asked:
        settings["shortest"] = min(settings["shortest"], longest)
    for key, most in (("drafts", MOST_DRAFTS), ("longest", LONGEST_LOOKUP), ("shortest", longest)):
        if key in settings and not 1 <= settings[key] <= most:
            raise ConfigError(
                f"{key} of {name} is out of range",
                code="strategy",
                tensor=key,
                expected=f"an integer from 1 to {most}",
                found=str(settings[key]),
            )
    return settings


def _value(strategy: str, key: str, text: str, kind: type) -> Any:
    if kind is not int:
        return text
    try:
        return int(text)
    except ValueError:
        raise ConfigError(
            f"{key} of {strategy} is no number",
            code="strategy",
            tensor=key,
            expected="an integer",
            found=repr(text),
        ) from None


def _integer(key: str, value: Any, source: str) -> int:
    least = 0 if key == "mask_token_id" else 1
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(
            f"{key} is out of range",
            code="strategy",
            tensor=key,
            expected=f"an integer from {least}",
            found=f"{value!r}, {source}",
        )
    return value
