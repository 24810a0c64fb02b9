"""An adapter over every format is that format's product plus its own; it merges into plain floats alone."""

import pytest
import torch

from .vectors import all_vectors, name_of


@pytest.mark.parametrize("vector", all_vectors(), ids=name_of)
def test_an_adapter_adds_its_product_and_never_changes_quantised_weights(vector):
    layer = vector.layer()
    layer.quant_method.process_weights_after_loading(layer)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, vector.in_features, generator=draw)
    before = layer(x)
    layer.init_lora(4, 8)
    assert torch.equal(layer(x), before), "B is zero"
    layer.lora_B.data.normal_(generator=draw)
    product = 2 * (x.double() @ layer.lora_A.double().t()) @ layer.lora_B.double().t()
    allowed = 1e-5 * float(product.abs().max() + before.abs().max())
    assert torch.allclose(layer(x).double(), before.double() + product, rtol=0, atol=allowed)
    bound = layer.bound
    assert "quantised" in layer.merge_lora() and layer.bound is bound
    layer.detach_adapter("default")
    assert torch.equal(layer(x), before)
