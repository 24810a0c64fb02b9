"""Tiny random encoders and decoders of transformers, as sentence-transformers' folders, and their hidden states."""

# T tokens, H hidden size

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor

WORDS = (
    *(
        "the",
        "a",
        "cat",
        "dog",
        "runs",
        "sleeps",
        "over",
        "under",
        "in",
        "green",
        "blue",
        "house",
        "of",
        "and",
    ),
    *("query", "document", "text", ":", "日", "本", "ü", "##s", "##ing"),
)
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
TEXTS = (
    "the cat runs",
    "",
    "A DOG sleeps under the blue house",
    "日本 ü zebra",
    "the green cat and the blue dog " * 9,
    "cats",
)
MAX_LENGTH = 24
SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
# transformers' name of each, and settings without which a tiny model would not show what is particular to it.
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", {}),
    "roberta": ("Roberta", {"pad_token_id": 1, "type_vocab_size": 1}),
    "xlm-roberta": ("XLMRoberta", {"pad_token_id": 1, "type_vocab_size": 1, "hidden_act": "gelu_new"}),
    # Layers 1 and 2 see 3 tokens on either side.
    "modernbert": ("ModernBert", {"pad_token_id": 0, "local_attention": 6}),
}
HEADS = {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3", HEADS),
    "gemma3_text": ("Gemma3Text", HEADS | {"query_pre_attn_scalar": 8}),
}


def make_model(family: str, kind: str = "Model", seed: int = 0, **settings: Any) -> Any:
    """Make a model with random weights, norms' and biases' too.  kind: the end of its class' name."""
    name, special = (ENCODERS | DECODERS)[family]
    given = SIZES | {"bos_token_id": None, "eos_token_id": None} | special | settings
    config = getattr(transformers, f"{name}Config")(**given)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}{kind}")(config).eval().float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.3 + (parameter.ndim == 1 and parameter.mean() > 0.5))
    return model


def make_tokenizer(length: int = 10) -> Tokenizer:
    """Make a word piece tokenizer, whose file cuts and pads to `length`, as those of encoders do."""
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    return tokenizer


def write(
    folder: Path,
    model: Any,
    behind: dict[str, dict[str, Any]] | None,
    **files: Any,
) -> Path:
    """Save a model as sentence-transformers does.

    behind: settings by the class of each module behind the transformer; None: no modules.json.
    files: contents of other JSON files, by their names without the ending.
    """
    model.float().save_pretrained(folder)
    make_tokenizer().save(str(folder / "tokenizer.json"))
    if behind is not None:
        entries = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
        for index, (kind, settings) in enumerate(behind.items(), 1):
            name = f"{index}_{kind}"
            entries.append(
                {
                    "idx": index,
                    "name": str(index),
                    "path": name,
                    "type": f"sentence_transformers.models.{kind}",
                }
            )
            (folder / name).mkdir()
            (folder / name / "config.json").write_text(json.dumps(settings))
        (folder / "modules.json").write_text(json.dumps(entries))
    files = {"sentence_bert_config": {"max_seq_length": MAX_LENGTH, "do_lower_case": False}} | files
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def ids_of(text: str, length: int = MAX_LENGTH) -> list[int]:
    """Encode a text as transformers does: cut to `length`, the special tokens included."""
    tokenizer = make_tokenizer()
    tokenizer.no_padding()
    tokenizer.enable_truncation(length)
    return tokenizer.encode(text).ids


@torch.no_grad()
def hidden_states(model: Any, ids: list[int]) -> Tensor:
    """Run transformers' model over one text.  Returns [T, H] float64."""
    return model.double()(input_ids=torch.tensor([ids])).last_hidden_state[0]


def edit_tensors(folder: Path, change: Any) -> None:
    """Rewrite the weights: `change` gets and returns tensors by name."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
