"""LLaDA2 as its training code writes it: all experts of a layer in one tensor, which `moe/experts.py` finds by itself."""

from __future__ import annotations

from pymllm.models import llada2_moe

DEFAULTS = llada2_moe.DEFAULTS
Model = llada2_moe.Model
