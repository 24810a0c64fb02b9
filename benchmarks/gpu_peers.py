"""The peers in the GPU tables: other libraries' kernels over the same weights and pages that ours get."""

# T tokens, O out_features, I in_features, G inputs of a group, E experts, K experts a token, H hidden size

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pymllm.kernels.attention import AttentionProblem, AttentionStep, PagedKV
from pymllm.kernels.canonical import E4M3_MAX, Fp8Weight, IntWeight
from pymllm.kernels.flashinfer.attention import WORKSPACE_BYTES, requests_of


@dataclass(frozen=True)
class Peer:
    """Another library's kernel.

    prepare: packs a weight in the kernel's own order.  given: makes what it gets for x, before the clock runs.
    multiply: (prepared, given) to [T, O].  error: the error of what it rounds activations to, relative to their size.
    """

    name: str
    prepare: Callable[[Any], Any]
    multiply: Callable[[Any, Any], Tensor]
    given: Callable[[Tensor], Any] = lambda x: x
    error: float = 0.0

    def calls(self, weights: Sequence[Any], x: Tensor) -> list[Callable[[], Tensor]]:
        """Make a call over each weight; several copies of a weight put it in several places."""
        given = self.given(x)
        return [partial(self.multiply, self.prepare(weight), given) for weight in weights]


def peers_of(weight: Any) -> tuple[Peer, ...]:
    """List the peers that multiply by weights of this kind."""
    if isinstance(weight, IntWeight) and weight.bits == 4:
        return (
            Peer("torch int4pack", _int4pack, lambda p, x: torch._weight_int4pack_mm(x, p[0], p[2], p[1])),
            Peer("gemlite A16W4", _gemlite, lambda layer, x: layer.forward(x)),
        )
    if isinstance(weight, Fp8Weight) and weight.block == (1, 0):
        name = "torch _scaled_mm, x quantised before"
        return (Peer(name, _fp8_rows, _scaled_mm, quantise_tokens, error=4e-2),)
    return ()


def _int4pack(weight: IntWeight) -> tuple[Tensor, Tensor, int]:
    """Pack in torch's order: two codes a byte, the earlier one above; a weight is (code - 8) * scale + zero."""
    assert weight.zeros is not None
    packed = torch._convert_weight_to_int4pack(weight.codes[:, ::2] << 4 | weight.codes[:, 1::2], 8)
    zeros = (8.0 - weight.zeros.float()) * weight.scales.float()
    both = torch.stack([weight.scales.float(), zeros], dim=-1)  # [O, I/G, 2]
    return packed, both.transpose(0, 1).contiguous().bfloat16(), weight.group_size


def _gemlite(weight: IntWeight) -> Any:
    from gemlite.helper import A16Wn

    assert weight.zeros is not None
    made = A16Wn(device=weight.codes.device, dtype=torch.bfloat16)
    scales, zeros = weight.scales.bfloat16(), weight.zeros.bfloat16()
    return made.from_weights(weight.codes, scales, zeros, weight.bits, weight.group_size)


def _fp8_rows(weight: Fp8Weight) -> tuple[Tensor, Tensor]:
    return weight.weight.clone().t(), weight.scales.float().t().contiguous()


def quantise_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise x [T, I].  Returns e4m3 codes [T, I] and a scale for each token [T, 1]."""
    scales = (x.float().abs().amax(-1, keepdim=True) / E4M3_MAX).clamp(min=1e-12)
    return (x.float() / scales).to(torch.float8_e4m3fn), scales


def _scaled_mm(weight: tuple[Tensor, Tensor], given: tuple[Tensor, Tensor]) -> Tensor:
    return torch._scaled_mm(
        given[0], weight[0], scale_a=given[1], scale_b=weight[1], out_dtype=torch.bfloat16
    )


def grouped_mm_experts(gate_up: Tensor, down: Tensor, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Run routed experts by torch's grouped matmul, sorted on the device.

    gate_up: [E, 2·I, H]; down: [E, H, I]; x: [T, H], all bfloat16.  ids, weights: [T, K].  Returns [T, H].
    """
    experts, top_k = gate_up.shape[0], ids.shape[1]
    chosen, order = ids.flatten().sort()
    ends = torch.searchsorted(chosen, torch.arange(experts, device=x.device), right=True).int()
    tokens = order // top_k
    gate, up = torch._grouped_mm(x[tokens], gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    answers = torch._grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)
    weighed = answers.float() * weights.flatten()[order].unsqueeze(-1)
    return (
        torch.zeros(x.shape, dtype=torch.float32, device=x.device).index_add_(0, tokens, weighed).to(x.dtype)
    )


def flashinfer_decode(
    problem: AttentionProblem, q: Tensor, step: AttentionStep, cache: PagedKV
) -> Callable[[], Tensor]:
    """Make a call of FlashInfer's paged decoding, planned before the clock runs.  q: [R, heads, D]."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    requests = requests_of(step, q.device)
    workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    wrapper.plan(
        requests.page_starts,
        requests.pages,
        requests.last_lengths,
        problem.num_heads,
        problem.num_kv_heads,
        problem.head_dim,
        step.page_size,
        q_data_type=problem.dtype,
        kv_data_type=problem.kv.dtype,
        sm_scale=problem.scale,
    )
    return lambda: wrapper.run(q, (cache.k, cache.v))
