"""The tokenizer that a GGUF file's metadata describes, built with the `tokenizers` library.

`tokenizer.ggml.model` names the kind: "gpt2" is byte-level BPE with the file's merges, and `tokenizer.ggml.pre` names
the way to split text before; "llama" is sentencepiece's BPE, whose merges follow from the tokens' scores. Any other
kind, or an unknown split, is an error once text is encoded: token ids still work.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pymllm.disk import names_files
from pymllm.errors import CheckpointError
from pymllm.text.chat_template import ChatTemplate, chat_template_of
from pymllm.text.encoders import Encoder, FastEncoder, panics_told
from pymllm.text.template_files import named_templates
from pymllm.text.tokenizer import Tokenizer
from pymllm.text.tokenizer_files import check_text
from pymllm.weights.checkpoint import Checkpoint

# Regular expressions that split text into words; BPE runs within each word.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The o200k split: as tekken's, with contractions at the end of their word, and digits by threes.
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
IDEOGRAPHS = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", IDEOGRAPHS, r"\p{N}")
DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
# By tokenizer.ggml.pre: the expressions that split a text one after the other. What is between matches is a word, too.
SPLITS: dict[str, tuple[str, ...]] = {}
SPLITS |= dict.fromkeys(("gpt-2", "gpt2", "mpt", "olmo", "phi-2", "jais"), (GPT2,))
SPLITS |= dict.fromkeys(("gigachat", "a.x-4.0", "mellum", "exaone4", "trillion", "granite-docling"), (GPT2,))
SPLITS |= dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "midm-2.0"), (LLAMA3,))
SPLITS |= dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), (LLAMA3,))
SPLITS |= dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2"), (QWEN2,))
SPLITS |= dict.fromkeys(("gpt-4o", "llama4", "kanana2"), (GPT4O,))
SPLITS |= {"tekken": (TEKKEN,), "deepseek-coder": CODER, "deepseek-v3": DEEPSEEK3}
# llama.cpp's own, for files that name none: punctuation apart, numbers apart, and digits by threes from the left.
SPLITS |= {"default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")}

# Each digit is a word of its own; GPT-2's split follows.
DIGITS_APART = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
SPLITS |= dict.fromkeys(DIGITS_APART, (r"\p{N}", GPT2))

# A text begins with the token bos, unless the file says otherwise.
BEGINS_WITH_BOS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "midm-2.0", "tekken")

# A word that is a token is not merged from its pieces.
WHOLE_TOKENS_FIRST = (*BEGINS_WITH_BOS, "glm4")

# Text is brought to NFC first.
COMPOSED = ("qwen2", "deepseek-r1-qwen")

# Values of tokenizer.ggml.token_type.
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4

# What stands for a space in sentencepiece's tokens.
SPACE = "\u2581"


@names_files
def open_tokenizer(checkpoint: Checkpoint, chat_template: str | Path | None = None) -> Tokenizer:
    """Open the tokenizer of a checkpoint, which is a folder or a GGUF file.

    chat_template: a file of Jinja text, or such text, in place of the checkpoint's own template; None: its own.
    """
    path, metadata = checkpoint.path, checkpoint.metadata
    tokenizer = GGUFTokenizer(path, metadata) if metadata else Tokenizer(path)
    if chat_template is not None:
        tokenizer.use_chat_template(chat_template_of(chat_template))
    return tokenizer


class GGUFTokenizer(Tokenizer):
    """A tokenizer made of a GGUF file's `metadata`.  path: the file."""

    def __init__(self, path: Path, metadata: Mapping[str, Any]) -> None:
        self.folder, self.metadata = path, metadata
        named = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
        # A sentencepiece file that does not number these has them where the library itself puts them.
        usual = {"bos": 1, "eos": 2, "unknown": 0} if str(self._get("model")) == "llama" else {}
        self.settings = {name: self._token(key, usual.get(key)) for key, name in named.items()}

    def _get(self, key: str, default: Any = None) -> Any:
        return self.metadata.get(f"tokenizer.ggml.{key}", default)

    def _token(self, key: str, usual: int | None) -> str | None:
        """Return the text of a special token that the metadata names by its id, else of the usual id; or None."""
        tokens, index = self._get("tokens"), self._get(f"{key}_token_id", usual)
        known = isinstance(tokens, list) and type(index) is int and 0 <= index < len(tokens)
        return tokens[index] if known else None

    @property
    def available(self) -> bool:
        kind = self._get("model")
        return isinstance(self._get("tokens"), list) and isinstance(kind, str) and kind in ("gpt2", "llama")

    @functools.cached_property
    @panics_told
    def encoder(self) -> Encoder:
        tokens, kind = self._get("tokens"), self._get("model")
        if not isinstance(tokens, list):
            raise self._unusable("the file has no tokenizer", "tokenizer-missing", "Pass token ids.")
        import tokenizers

        try:
            embedded = self.metadata.get("tokenizer.huggingface.json")
            if isinstance(embedded, str):
                check_text(embedded, str(self.folder))
                return FastEncoder(tokenizers.Tokenizer.from_str(embedded))
            if kind == "gpt2":
                built = self._byte_level(tokens)
            elif kind == "llama":
                built = self._sentencepiece(tokens)
            else:
                raise self._unusable(
                    f"the file has a tokenizer of the kind {kind!r}, which is not known here",
                    "tokenizer-unknown",
                )
            self._add_special_tokens(built, tokens)
        except CheckpointError:
            raise
        except Exception as error:
            # tokenizers raises bare Exception for what it cannot use.
            raise self._unusable(f"the tokenizer cannot be built: {error}", "tokenizer") from None
        return FastEncoder(built)

    def _unusable(self, message: str, code: str, fix: str = "Token ids still work.") -> CheckpointError:
        return CheckpointError(message, code=code, file=str(self.folder), fix=fix)

    def _byte_level(self, tokens: list[str]) -> Any:
        from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

        split = self._get("pre", "default")
        if split not in SPLITS:
            raise self._unusable(
                f"the file splits text by {split!r} (tokenizer.ggml.pre), which is not known here",
                "tokenizer-unknown",
            )
        merges = [tuple(merge.split(" ")) for merge in self._get("merges", ())]
        vocabulary = {token: index for index, token in enumerate(tokens)}
        model = models.BPE(vocabulary, merges, ignore_merges=split in WHOLE_TOKENS_FIRST)  # type: ignore[arg-type]
        built = Tokenizer(model)
        steps: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS[split]]
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        built.pre_tokenizer = pre_tokenizers.Sequence(steps)  # type: ignore[assignment]
        if split in COMPOSED:
            built.normalizer = normalizers.NFC()  # type: ignore[assignment]
        built.decoder = decoders.ByteLevel()  # type: ignore[assignment]
        return built

    def _sentencepiece(self, tokens: list[str]) -> Any:
        from tokenizers import Tokenizer, decoders, models, normalizers

        vocabulary = {token: index for index, token in enumerate(tokens)}
        stored, scores = self._get("merges"), self._get("scores")
        if stored is not None:
            merges = [tuple(merge.split(" ")) for merge in stored]
        elif scores is not None and len(scores) == len(tokens):
            merges = list(merges_of_scores(tokens, [float(score) for score in scores]))
        else:
            raise self._unusable("the tokenizer has no score for each token", "tokenizer")
        unknown = self.settings["unk_token"]
        model = models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)  # type: ignore[arg-type]
        built = Tokenizer(model)
        prefix = bool(self._get("add_space_prefix", True))
        normal: list[Any] = [normalizers.Prepend(SPACE)] if prefix else []
        built.normalizer = normalizers.Sequence([*normal, normalizers.Replace(" ", SPACE)])  # type: ignore[assignment]
        steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        if prefix:
            steps.append(decoders.Strip(" ", 1, 0))
        built.decoder = decoders.Sequence(steps)  # type: ignore[assignment]
        return built

    def _add_special_tokens(self, built: Any, tokens: list[str]) -> None:
        """Add the tokens that are never cut into pieces, and those that every text begins or ends with."""
        from tokenizers import AddedToken, processors

        kinds = self._get("token_type")
        typed = [
            (token, int(kind))
            for token, kind in zip(tokens, kinds if kinds is not None else (), strict=False)
        ]
        sentencepiece = self._get("model") == "llama"
        takes_spaces = sentencepiece and self.metadata.get("general.architecture") == "phi3"

        def added(token: str, special: bool) -> AddedToken:
            # Phi-3's own tokens take the spaces that follow them; those of the Llama tokenizer below do not.
            strips = takes_spaces and token not in ("<unk>", "<s>", "<|endoftext|>")
            return AddedToken(token, special=special, normalized=False, rstrip=strips)

        built.add_special_tokens(
            [added(token, True) for token, kind in typed if token and kind in (CONTROL, UNKNOWN)]
        )
        built.add_tokens([added(token, False) for token, kind in typed if token and kind == USER_DEFINED])
        begins = self._get("add_bos_token", sentencepiece or self._get("pre") in BEGINS_WITH_BOS)
        bos, eos = self.settings["bos_token"], self.settings["eos_token"]
        before = [bos] if begins and bos is not None else []
        after = [eos] if self._get("add_eos_token", False) and eos is not None else []
        if before or after:
            ids = [(token, built.token_to_id(token)) for token in dict.fromkeys([*before, *after])]
            built.post_processor = processors.TemplateProcessing(
                single=[*before, "$A", *after],  # type: ignore[arg-type]
                special_tokens=ids,
            )

    @functools.cached_property
    def chat_templates(self) -> dict[str, ChatTemplate]:
        key = "tokenizer.chat_template"
        named = self.metadata.get(f"{key}s")
        # Further ones have their names in a list, and each a key of its own.
        keys = {
            name: f"{key}.{name}"
            for name in (named if isinstance(named, list) else ())
            if isinstance(name, str)
        }
        found = {name: self.metadata.get(at) for name, at in {"default": key, **keys}.items()}
        given = {name: text for name, text in found.items() if text is not None and str(text)}
        texts = [{"name": name, "template": text} for name, text in given.items()]
        return named_templates(texts, str(self.folder))


def merges_of_scores(tokens: Sequence[str], scores: Sequence[float]) -> Iterator[tuple[str, str]]:
    """Yield sentencepiece's merges: any two tokens that make a third, the third of the best score first.

    Of several ways to make the same token, those of earlier tokens come first.
    """
    index = {token: position for position, token in enumerate(tokens)}
    made = []
    for token, score in zip(tokens, scores, strict=True):
        for cut in range(1, len(token)):
            left, right = index.get(token[:cut]), index.get(token[cut:])
            if left is not None and right is not None:
                made.append((-score, index[token], left, right))
    made.sort()
    return ((tokens[left], tokens[right]) for _, _, left, right in made)
