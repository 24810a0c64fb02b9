"""The model of cpu_decode.py as an OpenVINO graph: u4 weights in groups with zero points, a stateful key-value cache.

The graph has the shape that OpenVINO's exporters give it, so that its plugin fuses attention with the cache and rotary
positions; `infer` takes ids, an attention mask, positions and the order of the batch, and returns the last logits.
"""

# B batch, T tokens of this step, H heads, D head size

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as ops
from openvino.op.util import Variable, VariableInfo
from safetensors import safe_open


class Graph:
    """The builder of one model; `kept` holds the arrays that constants refer to until the model is saved."""

    def __init__(self, weights: Any, config: dict[str, Any], group: int) -> None:
        self.weights, self.config, self.group = weights, config, group
        self.kept: list[Any] = []
        self.sinks: list[Any] = []
        self.variables: list[Any] = []

    def weight(self, name: str) -> np.ndarray:
        return np.asarray(self.weights.get_tensor(f"{name}.weight").float().numpy())

    def linear(self, x: Any, name: str) -> Any:
        """Multiply: x @ dequantised(name).T."""
        weight = self.weight(name)
        outputs, inputs = weight.shape
        grouped = weight.reshape(outputs, -1, self.group)
        low, high = np.minimum(grouped.min(-1), 0), np.maximum(grouped.max(-1), 0)
        scales = ((high - low) / 15).astype(np.float16)
        zeros = np.rint(-low / scales.astype(np.float32)).clip(0, 15)
        codes = np.rint(grouped / scales[..., None].astype(np.float32)) + zeros[..., None]
        codes = codes.clip(0, 15)
        shape = (outputs, inputs // self.group)
        quantised = ops.subtract(
            ops.convert(self.u4(codes, (*shape, self.group)), "f16"),
            ops.convert(self.u4(zeros, (*shape, 1)), "f16"),
        )
        scaled = ops.multiply(quantised, ops.constant(scales[..., None]))
        flat = ops.reshape(scaled, np.array([outputs, inputs]), special_zero=False)
        return ops.matmul(x, ops.convert(flat, "f32"), False, True)

    def u4(self, codes: np.ndarray, shape: tuple[int, ...]) -> Any:
        flat = codes.astype(np.uint8).reshape(-1)
        self.kept.append(flat[0::2] | (flat[1::2] << 4))
        return ops.constant(ov.Tensor(self.kept[-1], ov.Shape(list(shape)), ov.Type.u4))

    def norm(self, x: Any, name: str) -> Any:
        square = ops.power(x, ops.constant(np.float32(2)))
        mean = ops.reduce_mean(square, ops.constant(np.array([-1])), keep_dims=True)
        root = ops.sqrt(ops.add(mean, ops.constant(np.float32(self.config["rms_norm_eps"]))))
        normed = ops.multiply(x, ops.divide(ops.constant(np.float32(1)), root))
        return ops.multiply(ops.constant(self.weight(name)), normed)

    def heads(self, x: Any, count: int) -> Any:
        """Split heads: [B, T, H * D] -> [B, H, T, D]."""
        shape = np.array([0, 0, count, self.config["head_dim"]])
        return ops.transpose(ops.reshape(x, shape, special_zero=True), np.array([0, 2, 1, 3]))

    def rotate(self, x: Any, cos: Any, sin: Any) -> Any:
        half = self.config["head_dim"] // 2

        def part(begin: int, end: int) -> Any:
            bounds = [ops.constant(np.array([value])) for value in (begin, end, 1, 3)]
            return ops.slice(x, *bounds)

        turned = ops.concat([ops.multiply(part(half, 2 * half), np.float32(-1)), part(0, half)], -1)
        return ops.add(ops.multiply(x, cos), ops.multiply(turned, sin))

    def cached(self, new: Any, name: str, batch: Any, beam: Any) -> Any:
        """Join what the cache holds and what is new, along T, and update the cache."""
        heads, size = self.config["num_key_value_heads"], self.config["head_dim"]
        info = VariableInfo()
        info.data_shape = ov.PartialShape([-1, heads, -1, size])
        info.data_type, info.variable_id = ov.Type.f32, name
        variable = Variable(info)
        self.variables.append(variable)
        shape = ops.concat([batch, ops.constant(np.array([heads, 0, size]))], 0)
        past = ops.read_value(ops.broadcast(np.float32(0), shape), variable)
        ordered = ops.gather(past, beam, ops.constant(np.int64(0)))
        both = ops.concat([ordered, new], 2)
        self.sinks.append(ops.assign(both, variable))
        return both

    def repeated(self, x: Any, batch: Any, length: Any) -> Any:
        """Repeat each key head for all of its query heads.  The plugin fuses only if nothing asks for x's shape."""
        queries, heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        size, each = self.config["head_dim"], queries // heads
        wide = ops.concat([batch, ops.constant(np.array([heads, each])), length, np.array([size])], 0)
        spread = ops.broadcast(ops.unsqueeze(x, np.array(2)), wide, "BIDIRECTIONAL")
        return ops.reshape(spread, np.array([0, queries, -1, size]), special_zero=True)

    def model(self) -> Any:
        config = self.config
        ids = ops.parameter([-1, -1], ov.Type.i64)
        mask = ops.parameter([-1, -1], ov.Type.i64)
        positions = ops.parameter([-1, -1], ov.Type.i64)
        beam = ops.parameter([-1], ov.Type.i32)
        zero = ops.constant(np.int64(0))
        batch = ops.gather(ops.shape_of(ids), ops.constant(np.array([0])), zero)
        table = ops.constant(self.weight("model.embed_tokens").astype(np.float16))
        hidden = ops.gather(ops.convert(table, "f32"), ids, zero)

        half = config["head_dim"] // 2
        frequencies = config["rope_theta"] ** (-np.arange(half, dtype=np.float32) / half)
        angles = ops.matmul(
            ops.constant(frequencies.reshape(1, half, 1).astype(np.float32)),
            ops.convert(ops.unsqueeze(positions, np.array(1)), "f32"),
            False,
            False,
        )
        angles = ops.transpose(angles, np.array([0, 2, 1]))
        both = ops.concat([angles, angles], -1)
        cos, sin = (ops.unsqueeze(f(both), np.array(1)) for f in (ops.cos, ops.sin))

        bias = self.causal_bias(ids, mask, zero)
        length = ops.gather(ops.shape_of(mask), ops.constant(np.array([1])), zero)
        for layer in range(config["num_hidden_layers"]):
            name = f"model.layers.{layer}"
            x = self.norm(hidden, f"{name}.input_layernorm")
            attention = f"{name}.self_attn"
            q = self.heads(self.linear(x, f"{attention}.q_proj"), config["num_attention_heads"])
            k = self.heads(self.linear(x, f"{attention}.k_proj"), config["num_key_value_heads"])
            v = self.heads(self.linear(x, f"{attention}.v_proj"), config["num_key_value_heads"])
            k = self.cached(self.rotate(k, cos, sin), f"past_key.{layer}", batch, beam)
            v = self.cached(v, f"past_value.{layer}", batch, beam)
            result = ops.scaled_dot_product_attention(
                self.rotate(q, cos, sin),
                self.repeated(k, batch, length),
                self.repeated(v, batch, length),
                bias,
            )
            merged = ops.reshape(
                ops.transpose(result, np.array([0, 2, 1, 3])),
                np.array([0, 0, config["num_attention_heads"] * config["head_dim"]]),
                special_zero=True,
            )
            hidden = ops.add(hidden, self.linear(merged, f"{attention}.o_proj"))
            x = self.norm(hidden, f"{name}.post_attention_layernorm")
            gate = ops.swish(self.linear(x, f"{name}.mlp.gate_proj"))
            inner = ops.multiply(gate, self.linear(x, f"{name}.mlp.up_proj"))
            hidden = ops.add(hidden, self.linear(inner, f"{name}.mlp.down_proj"))
        last = ops.gather(
            self.norm(hidden, "model.norm"), ops.constant(np.array([-1])), ops.constant(np.int64(1))
        )
        logits = self.linear(last, "model.embed_tokens")
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "beam_idx": beam}
        for name, parameter in inputs.items():
            parameter.output(0).set_names({name})
        return ov.Model([ops.result(logits)], self.sinks, list(inputs.values()), self.variables, "llama")

    def causal_bias(self, ids: Any, mask: Any, zero: Any) -> Any:
        """Make the mask, [B, 1, T, all] float: 0 where a query sees a key, else the least float."""
        new = ops.gather(ops.shape_of(ids), ops.constant(np.int64(1)), zero)
        total = ops.gather(ops.shape_of(mask), ops.constant(np.int64(1)), zero)
        keys = ops.range(zero, total, ops.constant(np.int64(1)), "i64")
        queries = ops.range(ops.subtract(total, new), total, ops.constant(np.int64(1)), "i64")
        seen = ops.less_equal(ops.unsqueeze(keys, np.array(0)), ops.unsqueeze(queries, np.array(1)))
        kept = ops.convert(ops.unsqueeze(mask, np.array([1, 2])), "boolean")
        both = ops.logical_and(ops.unsqueeze(seen, np.array([0, 1])), kept)
        least = np.float32(np.finfo(np.float32).min)
        return ops.select(both, ops.constant(np.float32(0)), ops.constant(least))


def write_model(folder: Path, checkpoint: Path, config: dict[str, Any], group: int) -> None:
    with safe_open(checkpoint, framework="pt") as weights:
        graph = Graph(weights, config, group)
        ov.save_model(graph.model(), folder / "model.xml", compress_to_fp16=False)
