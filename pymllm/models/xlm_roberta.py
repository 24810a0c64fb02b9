"""XLM-R (model type xlm-roberta): RoBERTa over sentencepiece's vocabulary of a hundred languages."""

from __future__ import annotations

from pymllm.models import roberta

DEFAULTS = roberta.DEFAULTS
RENAMED = roberta.RENAMED


class Model(roberta.Model):
    """XLMRobertaModel, without its pooler."""
