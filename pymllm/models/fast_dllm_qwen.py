"""Fast-dLLM v2 (`Fast_dLLM_Qwen`): Qwen2.5 that was trained on to fill in blocks, and predicts the next token still."""

from __future__ import annotations

from pymllm.models import qwen2
from pymllm.models.strategy import BlockDiffusion

DEFAULTS = qwen2.DEFAULTS
ARCHITECTURE = "Fast_dLLM_QwenForCausalLM"


class Model(qwen2.Model):
    """Fast_dLLM_QwenForCausalLM."""

    # 151665 is |<MASK>|; the threshold is that of the authors' chat script.
    block_diffusion = BlockDiffusion(
        block_length=32, mask_token_id=151665, confidence_threshold=0.9, shifted=True
    )
