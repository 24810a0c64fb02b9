"""What tests of damaged checkpoints share."""

from __future__ import annotations

import pytest

from pymllm.api import load_model
from pymllm.errors import CheckpointError, PymllmError


def refused(folder, reads, error=CheckpointError, **options) -> PymllmError:
    """The one error of loading `folder`, from headers alone."""
    with pytest.raises(error) as caught:
        load_model(folder, device="cpu", **options)
    assert reads == [], "refused only after tensors were read"
    return caught.value
