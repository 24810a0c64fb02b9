"""A KV store in Triton, which may rotate queries and keys on the way: one launch a layer, several heads a block."""

# T tokens of this step, H query heads, Hkv key heads, D head size, Dv value head size, R rotary size

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from pymllm.kernels.attention import AttentionProblem, AttentionStep, KVType, PagedKV
from pymllm.kernels.canonical import E4M3_MAX
from pymllm.kernels.hardware import Device
from pymllm.kernels.triton.ahead_of_time import Case
from pymllm.kernels.triton.attention import EIGHT_BIT, example_problem, meta_tensors
from pymllm.kernels.triton.elementwise import heads_of_a_block
from pymllm.kernels.triton.kv_store_kernels import store_tokens
from pymllm.kernels.triton.launch import interpreting
from pymllm.kernels.triton.requirements import FLOATS, why_not_device
from pymllm.kernels.triton.tuning import architecture_of, divide, next_power


class TritonKVStore:
    """A KV store that scales, rounds and writes some heads of a token in each block.

    Tokens with a slot below 0 are skipped on the device.
    """

    name = "triton"
    device_type = "cuda"  # the only one it runs on
    capturable = True

    def why_not(self, problem: AttentionProblem) -> str | None:
        if problem.kv.dtype not in (*FLOATS, torch.float32, *EIGHT_BIT):
            return f"writes floats, fp8 and int8, not {problem.kv}"
        return why_not_device(problem.device)

    def run(
        self, problem: AttentionProblem, k: Tensor, v: Tensor, cache: PagedKV, step: AttentionStep
    ) -> None:
        self._launch(problem, None, k, v, cache, step, None, None)

    def rotate_and_store(
        self,
        problem: AttentionProblem,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: PagedKV,
        step: AttentionStep,
        cos: Tensor,
        sin: Tensor,
    ) -> Tensor:
        """Rotate q and k as `TorchElementwise.rotate` does, and store k and v.  Returns q rotated, [T, H, D].

        q: [T, H, D].  k: [T, Hkv, D].  v: [T, Hkv, Dv].  cos, sin: [T, R/2] float32.
        """
        y = self._launch(problem, q, k, v, cache, step, cos, sin)
        assert y is not None
        return y

    def _launch(
        self,
        problem: AttentionProblem,
        q: Tensor | None,
        k: Tensor,
        v: Tensor,
        cache: PagedKV,
        step: AttentionStep,
        cos: Tensor | None,
        sin: Tensor | None,
    ) -> Tensor | None:
        slots, tokens, kv_heads = step.slot_mapping, k.shape[0], k.shape[1]
        if k.is_cpu:  # as for attention
            slots = step.stored_slots(tokens, cache.k.shape[0] * cache.k.shape[1])
        assert slots is not None
        kind, as_bytes = cache.type, cache.type.dtype is torch.float8_e4m3fn
        hardware = architecture_of(problem.device).fp8 and not interpreting()
        pages = (cache.k, cache.v)
        if as_bytes and not hardware:
            pages = (cache.k.view(torch.uint8), cache.v.view(torch.uint8))
        k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
        size, value_size = k.shape[-1], v.shape[-1]
        heads = half = 0
        y = None
        if q is not None:
            assert cos is not None and sin is not None
            q, cos, sin = q if q.stride(-1) == 1 else q.contiguous(), cos.contiguous(), sin.contiguous()
            heads, half, y = q.shape[1], cos.shape[-1], q.new_empty(q.shape)
        rotated = next_power(max(half, size - 2 * half))
        widest = max(next_power(value_size), 2 * rotated if half else next_power(size))
        together, warps = heads_of_a_block(tokens, max(heads, kv_heads), widest)
        store_tokens.launch(
            (tokens, divide(heads, together) + 2 * divide(kv_heads, together)),
            k,
            v,
            q,
            y,
            *pages,
            cache.k_scale,
            cache.v_scale,
            slots,
            cos,
            sin,
            0 if q is None else q.stride(0),
            0 if q is None else q.stride(1),
            k.stride(0),
            k.stride(1),
            v.stride(0),
            v.stride(1),
            HEADS=heads,
            KV_HEADS=kv_heads,
            D=size,
            DV=value_size,
            HALF=half,
            LARGEST=E4M3_MAX if as_bytes else 127.0,
            SCALING=kind.scaling,
            INTEGER=kind.dtype is torch.int8,
            BYTES=as_bytes,
            HARDWARE=hardware,
            BLOCK_H=together,
            BLOCK_R=rotated,
            BLOCK_D=next_power(size),
            BLOCK_DV=next_power(value_size),
            num_warps=warps,
        )
        return y

    def cases(self, device: Device) -> Iterator[Case]:
        """Yield stores of one token and of many, alone and with rotations of whole heads and of parts."""
        kinds = (
            KVType(torch.bfloat16),
            KVType(torch.float8_e4m3fn, "static"),
            KVType(torch.float8_e4m3fn, "token"),
            KVType(torch.int8, "token"),
        )
        for kind in kinds:
            problem = example_problem(device, kind)

            def run(rotary: int, tokens: int, problem: AttentionProblem = problem) -> None:
                q, k, v, cache = meta_tensors(problem, tokens, 1024)
                step = AttentionStep(slot_mapping=torch.empty(tokens, dtype=torch.int64, device="meta"))
                table = torch.empty((tokens, rotary // 2), device="meta")
                if rotary:
                    self.rotate_and_store(problem, q, k, v, cache, step, table, table)
                else:
                    self.run(problem, k, v, cache, step)

            for tokens in (1, 64):
                yield Case(f"{kind} cache, {tokens} tokens", partial(run, 0, tokens))
                for rotary in (128, 32):
                    yield Case(
                        f"{kind} cache, {tokens} tokens, {rotary} elements rotated",
                        partial(run, rotary, tokens),
                    )
