"""The answers of /v1/embeddings."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pymllm.embedding.embedder import EmbeddingInput


def embedding_answer(
    model: str, vectors: Sequence[Tensor], inputs: Sequence[EmbeddingInput], encoding: str
) -> dict[str, Any]:
    """Make the answer to a request for embeddings.  encoding: "float", or "base64" of little-endian float32."""
    tokens = sum(len(one.ids) for one in inputs)
    encode = _encoded if encoding == "base64" else Tensor.tolist
    data = [
        {"object": "embedding", "index": index, "embedding": encode(vector)}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": model, "usage": usage}


def _encoded(vector: Tensor) -> str:
    return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode("ascii")
