"""LLaDA2 as its training code writes it: a tensor has all experts of a layer, which `moe/experts.py` sees by itself."""

from __future__ import annotations

from pymllm.models import llada2_moe

DEFAULTS = llada2_moe.DEFAULTS
Model = llada2_moe.Model
