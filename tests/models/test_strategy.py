"""Where the settings of a strategy come from."""

from __future__ import annotations

import pytest

from pymllm.engine.prefixes import PageKeys
from pymllm.errors import ConfigError
from pymllm.models.strategy import BlockDiffusion, choose_strategy

FAMILY = BlockDiffusion(4, 99, 0.9)


def choose(spec=None, family=FAMILY, config=(), generation=(), mask=None, vocabulary=100):
    return choose_strategy(spec, family, dict(config), dict(generation), vocabulary, lambda: mask)


@pytest.mark.parametrize(
    "given, expected, source",
    (
        ({"spec": "block_diffusion:mask_token_id=1"}, 1, "as asked"),
        ({"spec": None}, 2, "mask_token_id of config.json"),
        ({"config": {}}, 3, "mask_token_id of generation_config.json"),
        ({"config": {}, "generation": {}}, 4, "the tokenizer's mask token"),
        ({"config": {}, "generation": {}, "mask": None}, 99, "as is usual in its family"),
    ),
)
def test_the_mask_token_is_the_first_that_is_there(given, expected, source):
    everything = {"config": {"mask_token_id": 2}, "generation": {"mask_token_id": 3}, "mask": 4}
    chosen = choose(**{**everything, **given})
    assert (chosen.settings["mask_token_id"], chosen.sources["mask_token_id"]) == (expected, source)


@pytest.mark.parametrize("name", ("block_size", "bd_size", "block_length"))
def test_the_block_length_is_read_under_each_of_its_names(name):
    assert choose(config={name: 24}).block_length == 24 and choose().block_length == 4
    assert choose("block_diffusion:block_length=7", config={name: 24}).block_length == 7


def test_a_mask_token_outside_the_vocabulary_is_refused():
    with pytest.raises(ConfigError, match="0 to 98"):
        choose(vocabulary=99)


def test_a_group_of_pages_has_keys_of_all_its_tokens():
    keys, other = PageKeys(((0, 0), None), group=2), PageKeys(((0, 0), None), group=2)
    keys.extend([1] * 12, 4)
    other.extend([1] * 7 + [2] + [1] * 4, 4)
    assert len(keys.made) == len(other.made) == 2  # the third page's group is not full
    assert not set(keys.made) & set(other.made)
