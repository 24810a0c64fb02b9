"""What every test of attention leaves behind: nothing."""

import pytest

from pymllm.attention import reset_warming_up, set_fetch_fn_for_attn_metadata


@pytest.fixture(autouse=True)
def nothing_installed():
    """Forget the metadata hook and the warm-up flag that a test has set."""
    yield
    set_fetch_fn_for_attn_metadata(None)
    reset_warming_up()
