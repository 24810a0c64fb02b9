"""A text model of transformers that has no class with a head: the model inside a wrapper, and the wrapper's head."""

from __future__ import annotations

from typing import Any

from torch import nn


def make_text_only(text_class: Any, bias: bool) -> Any:
    """Make a class of a text model with a head.

    text_class: the model's, whose modules the class has below `model`.  bias: whether the head has one.
    """
    from transformers import PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutputWithPast

    family = next(c for c in text_class.__mro__[1:] if issubclass(c, PreTrainedModel))

    class TextOnly(family):  # type: ignore[misc, valid-type]
        base_model_prefix = "model"
        _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model = text_class(config)
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=bias)
            self.post_init()

        def forward(self, input_ids: Any = None, position_ids: Any = None, **options: Any) -> Any:
            hidden = self.model(input_ids=input_ids, position_ids=position_ids, **options)[0]
            return CausalLMOutputWithPast(logits=self.lm_head(hidden))

    TextOnly.config_class = text_class.config_class
    return TextOnly
