"""Good tokenizers of every model, the steps that one may have, and the files beside it."""

from __future__ import annotations

import json
from typing import Any

from pymllm.text.tokenizer import BYTES, SPACE

from ..gguf_files import byte_tokens

FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"
SPECIAL, ADDED = "special_tokens_map.json", "added_tokens.json"

NORMALIZERS: tuple[Any, ...] = (
    *(None, {"type": "NFC"}, {"type": "NFD"}, {"type": "NFKC"}, {"type": "NFKD"}, {"type": "Lowercase"}),
    *({"type": "StripAccents"}, {"type": "Strip", "strip_left": True, "strip_right": True}, {"type": "Nmt"}),
    {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": True,
        "strip_accents": None,
        "lowercase": True,
    },
    *(
        {"type": "Prepend", "prepend": SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
    ),
    *({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}, {"type": "ByteLevel"}),
    *(
        {"type": "Replace", "pattern": {"String": ""}, "content": "x"},
        {"type": "Replace", "pattern": {"String": "llo"}, "content": ""},
    ),
    *(
        {"type": "Replace", "pattern": {"Regex": "("}, "content": ""},
        {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    ),
    {
        "type": "Sequence",
        "normalizers": [{"type": "NFC"}, {"type": "Replace", "pattern": {"String": "hello"}, "content": "h"}],
    },
    *({"type": "Prepend", "prepend": ""}, {"type": "Sequence", "normalizers": []}),
)
PRE_TOKENIZERS: tuple[Any, ...] = (
    *(None, {"type": "Whitespace"}, {"type": "WhitespaceSplit"}, {"type": "BertPreTokenizer"}),
    *(
        {"type": "ByteLevel", "add_prefix_space": flag, "trim_offsets": True, "use_regex": flag}
        for flag in (True, False)
    ),
    *(
        {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": split}
        for scheme in ("always", "never", "first")
        for split in (True, False)
    ),
    *(
        {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": invert}
        for pattern in ({"Regex": r"\p{N}{1,3}|\s+"}, {"String": "l"}, {"Regex": "(a+)+$"}, {"Regex": ""})
        for behavior in ("Isolated", "Removed", "MergedWithPrevious", "Contiguous")
        for invert in (True, False)
    ),
    *({"type": "Punctuation", "behavior": "Removed"}, {"type": "Digits", "individual_digits": True}),
    *({"type": "UnicodeScripts"}, {"type": "FixedLength", "length": 5}, {"type": "FixedLength", "length": 0}),
    {"type": "CharDelimiterSplit", "delimiter": "l"},
    {
        "type": "Sequence",
        "pretokenizers": [{"type": "WhitespaceSplit"}, {"type": "Digits", "individual_digits": False}],
    },
)
DECODERS: tuple[Any, ...] = (
    *(None, {"type": "ByteLevel"}, {"type": "WordPiece", "prefix": "##", "cleanup": True}, {"type": "Fuse"}),
    *(
        {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "always", "split": True},
        {"type": "ByteFallback"},
    ),
    *(
        {"type": "BPEDecoder", "suffix": "</w>"},
        {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True},
    ),
    *(
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        {"type": "Strip", "content": "h", "start": 9, "stop": 9},
    ),
    {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
            *(
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ),
        ],
    },
)
PROCESSORS: tuple[Any, ...] = (
    *(None, {"type": "ByteLevel", "trim_offsets": True}),
    *(
        {"type": kind, "sep": ["</s>", 2], "cls": ["<s>", 1]}
        for kind in ("BertProcessing", "RobertaProcessing")
    ),
    {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    },
    {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}},
)
SLOTS = {
    "normalizer": NORMALIZERS,
    "pre_tokenizer": PRE_TOKENIZERS,
    "decoder": DECODERS,
    "post_processor": PROCESSORS,
    "truncation": (
        None,
        {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        {"direction": "Left", "max_length": 1, "strategy": "OnlySecond", "stride": 5},
    ),
    "padding": (
        None,
        {
            **{"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": 0},
            **{"pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"},
        },
    ),
}

MARKS = ("<unk>", "<s>", "</s>", "<mask>")
PIECES = (
    "h",
    "e",
    "l",
    "o",
    "w",
    "r",
    "d",
    "a",
    "he",
    "ll",
    "llo",
    "hello",
    "##l",
    "##o",
    SPACE,
    f"{SPACE}h",
    "1",
    "中",
)
LETTERS = list(BYTES)


def added(index: int, content: str, **flags: bool) -> dict[str, Any]:
    usual = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": index, "content": content, **usual, **flags}


def described(model: dict[str, Any], **steps: Any) -> dict[str, Any]:
    marks = [added(index, mark) for index, mark in enumerate(MARKS)]
    marks[3] |= {"lstrip": True, "normalized": True}
    empty = dict.fromkeys(
        ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    )
    return {"version": "1.0", **empty, "added_tokens": marks, **steps, "model": model}


def numbered(tokens: Any) -> dict[str, int]:
    return {token: index for index, token in enumerate(tokens)}


BPE = {
    **{"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None},
    **{"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False},
}
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
SUBJECTS: dict[str, dict[str, Any]] = {
    "byte-level BPE": described(
        {
            **BPE,
            "vocab": numbered([*MARKS, *LETTERS, "he", "ll", "Ġh", "hello"]),
            "merges": [["h", "e"], ["l", "l"], ["Ġ", "h"]],
        },
        **{"pre_tokenizer": PRE_TOKENIZERS[4], "decoder": DECODERS[1], "post_processor": PROCESSORS[1]},
    ),
    "sentencepiece's BPE": described(
        {
            **{**BPE, "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True},
            **{"vocab": numbered([*MARKS, *BYTE_TOKENS, *PIECES]), "merges": [["h", "e"], ["l", "l"]]},
        },
        **{"normalizer": NORMALIZERS[11], "decoder": DECODERS[-1], "post_processor": PROCESSORS[4]},
    ),
    "few letters": described(
        {**BPE, "unk_token": "<unk>", "vocab": numbered([*MARKS, *PIECES]), "merges": ["h e", "l l"]}
    ),
    "WordPiece": described(
        {
            **{"type": "WordPiece", "unk_token": "<unk>", "continuing_subword_prefix": "##"},
            **{"max_input_chars_per_word": 100, "vocab": numbered([*MARKS, *PIECES])},
        },
        **{"normalizer": NORMALIZERS[9], "pre_tokenizer": PRE_TOKENIZERS[3], "decoder": DECODERS[2]},
        post_processor=PROCESSORS[2],
    ),
    "unigram": described(
        {
            **{"type": "Unigram", "unk_id": 0, "byte_fallback": False},
            "vocab": [[piece, -0.5 * index] for index, piece in enumerate((*MARKS, *PIECES))],
        },
        **{"pre_tokenizer": PRE_TOKENIZERS[6], "decoder": DECODERS[4]},
    ),
    "words": described(
        {"type": "WordLevel", "vocab": numbered([*MARKS, "hello", "world"]), "unk_token": "<unk>"},
        pre_tokenizer={"type": "Whitespace"},
    ),
}
SETTINGS = {
    **{
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "lstrip": False},
    },
    **{"mask_token": "<mask>", "add_bos_token": True, "model_max_length": 128, "truncation_side": "left"},
    **{"chat_template": "{{ messages[0].content }}{{ eos_token }}", "clean_up_tokenization_spaces": False},
    **{
        "added_tokens_decoder": {"0": {"content": "<unk>", "special": True}},
        "extra_special_tokens": ["<mask>"],
    },
}
BESIDE = {
    SPECIAL: {"bos_token": "<s>", "unk_token": {"content": "<unk>"}, "additional_special_tokens": ["<mask>"]},
    ADDED: {"<mask>": 3},
}
# Files of which transformers makes a tokenizer.
VOCABULARIES: dict[str, dict[str, str]] = {
    "vocab.txt": {
        "vocab.txt": "\n".join(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *PIECES)) + "\n",
        CONFIG: json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True}),
        "config.json": json.dumps({"model_type": "bert"}),
    },
    "vocab.json": {
        "vocab.json": json.dumps(numbered(["<|endoftext|>", *LETTERS, "he", "ll"])),
        "merges.txt": "#version: 0.2\nh e\nl l\n",
        CONFIG: json.dumps({"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False}),
        "config.json": json.dumps({"model_type": "gpt2"}),
    },
}
KEY = "tokenizer.ggml."
GGUF: dict[str, dict[str, Any]] = {
    "gguf byte-level": {
        **{
            f"{KEY}model": "gpt2",
            f"{KEY}pre": "llama-bpe",
            f"{KEY}tokens": byte_tokens(),
            f"{KEY}merges": ["h e", "l l"],
        },
        **{f"{KEY}token_type": [1] * 95 + [3], f"{KEY}eos_token_id": 95, f"{KEY}bos_token_id": 95},
        **{
            f"{KEY}add_bos_token": True,
            f"{KEY}add_eos_token": False,
            "tokenizer.chat_template": "{{ bos_token }}",
        },
        **{
            "general.architecture": "llama",
            "tokenizer.chat_templates": ["a"],
            "tokenizer.chat_template.a": "{{ 1 }}",
        },
    },
    "gguf sentencepiece": {
        **{f"{KEY}model": "llama", f"{KEY}tokens": [*MARKS, *BYTE_TOKENS, *PIECES]},
        f"{KEY}scores": [-0.5 * index for index in range(4 + 256 + len(PIECES))],
        f"{KEY}token_type": [2, 3, 3, 4] + [6] * 256 + [1] * len(PIECES),
        **{f"{KEY}add_space_prefix": True, f"{KEY}unknown_token_id": 0, "general.architecture": "phi3"},
    },
}
