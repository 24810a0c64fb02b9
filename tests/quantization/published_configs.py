"""Quantisation configs as writers and published checkpoints have them, without their long lists of names.

`CONFIGS`: by the writer or the checkpoint; each must be accepted.  `OBJECTS_BY_NAME`: the objects in them whose keys
are names of layers, of groups or the like, and not settings.
"""

from __future__ import annotations

from typing import Any

TORCH_INT8 = {"_type": "torch.dtype", "_data": "int8"}
META = {
    "act_group_aware": False,
    "auto_forward_data_parallel": True,
    "damp_auto_increment": 0.01,
    "damp_percent": 0.05,
    "dense_vram_strategy": "exclusive",
    "dense_vram_strategy_devices": None,
    "fallback": {"smooth": None, "strategy": "rtn", "threshold": "0.5%"},
    "foem": None,
    "gc_mode": "interval",
    "gptaq": {"alpha": 0.25, "device": "auto"},
    "hessian": {
        "chunk_bytes": None,
        "chunk_size": None,
        "dedup_shared_inputs": True,
        "staging_dtype": "float32",
    },
    "mock_quantization": False,
    "mse": 0.0,
    "offload_to_disk": False,
    "pack_impl": "cpu",
    "quantizer": ["gptqmodel:7.6.0"],
    "static_groups": False,
    "telemetry": {"device": False},
    "true_sequential": True,
    "uri": "https://github.com/modelcloud/gptqmodel",
    "wait_for_submodule_finalizers": False,
}
TRANSFORMERS_GPTQ = {
    "batch_size": 1,
    "bits": 4,
    "block_name_to_quantize": None,
    "cache_block_outputs": True,
    "damp_percent": 0.01,
    "dataset": None,
    "desc_act": False,
    "exllama_config": {"version": 1},
    "group_size": 128,
    "max_input_length": None,
    "model_seqlen": None,
    "module_name_preceding_first_block": None,
    "modules_in_block_to_quantize": None,
    "pad_token_id": None,
    "quant_method": "gptq",
    "sym": True,
    "tokenizer": None,
    "true_sequential": True,
    "use_cuda_fp16": False,
    "use_exllama": True,
}
AUTOGPTQ = {
    "bits": 4,
    "group_size": 128,
    "damp_percent": 0.1,
    "desc_act": True,
    "static_groups": False,
    "sym": True,
    "true_sequential": True,
    "model_name_or_path": None,
    "model_file_base_name": "model",
    "is_marlin_format": False,
    "quant_method": "gptq",
}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
BITSANDBYTES = {
    "_load_in_4bit": True,
    "_load_in_8bit": False,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False,
    "llm_int8_skip_modules": ["lm_head", "multi_modal_projector", "merger", "modality_projection"],
    "llm_int8_threshold": 6.0,
    "load_in_4bit": True,
    "load_in_8bit": False,
    "quant_method": "bitsandbytes",
}


def codes(**settings: Any) -> dict[str, Any]:
    """Make one of compressed-tensors' descriptions of codes, as 0.19 writes it in full."""
    return {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": None,
        "observer": "minmax",
        "observer_kwargs": {},
        "scale_dtype": None,
        "symmetric": True,
        "zp_dtype": None,
        **settings,
    }


def compressed(format: str, weights: Any, inputs: Any = None, **more: Any) -> dict[str, Any]:
    """Make a config of compressed-tensors with one group."""
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
    }
    return {
        "config_groups": {"group_0": group},
        "format": format,
        "global_compression_ratio": 1.4577920,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.11.0",
        **more,
    }


def quark(**layer: Any) -> dict[str, Any]:
    """Make one of Quark's descriptions of codes, as 0.8 and later write it in full."""
    return {
        "ch_axis": None,
        "dtype": "fp8_e4m3",
        "group_size": None,
        "block_size": None,
        "is_dynamic": False,
        "is_scale_quant": False,
        "mx_element_dtype": None,
        "observer_cls": "PerTensorMinMaxObserver",
        "qat_spec": None,
        "qscheme": "per_tensor",
        "round_method": "half_even",
        "scale_calculation_mode": None,
        "scale_format": None,
        "scale_type": "float",
        "symmetric": True,
        "zero_point_type": "int32",
        **layer,
    }


QUARK_SCHEME = {
    "bias": None,
    "input_tensors": quark(),
    "output_tensors": None,
    "target_device": None,
    "weight": quark(),
}
QUARK = {
    "algo_config": [
        {
            "name": "autosmoothquant",
            "scaling_layers": [{"prev_op": "input_layernorm", "layers": ["self_attn.q_proj"]}],
            "model_decoder_layers": "model.layers",
            "compute_scale_loss": "MSE",
        }
    ],
    "exclude": ["lm_head"],
    "export": {
        "kv_cache_group": ["*k_proj", "*v_proj"],
        "min_kv_scale": 0.0,
        "pack_method": "reorder",
        "weight_format": "real_quantized",
        "weight_merge_groups": None,
    },
    "global_quant_config": QUARK_SCHEME,
    "kv_cache_post_rope": False,
    "layer_quant_config": {
        "*k_proj": {**QUARK_SCHEME, "output_tensors": quark()},
        "*v_proj": {**QUARK_SCHEME, "output_tensors": quark()},
    },
    "layer_type_quant_config": {},
    "quant_method": "quark",
    "quant_mode": "eager_mode",
    "softmax_quant_spec": None,
    "version": "0.9",
}
HQQ_PARAMS = {
    "offload_meta": False,
    "scale_quant_params": None,
    "weight_quant_params": {
        "axis": 1,
        "channel_wise": True,
        "group_size": 64,
        "nbits": 4,
        "optimize": True,
        "round_zero": True,
        "view_as_float": False,
    },
    "zero_quant_params": None,
}
AUTOROUND = {
    "amp": True,
    "autoround_version": "0.5.1",
    "batch_size": 8,
    "bits": 4,
    "block_name_to_quantize": "model.layers",
    "data_type": "int",
    "enable_minmax_tuning": True,
    "enable_norm_bias_tuning": False,
    "enable_quanted_input": True,
    "extra_config": {"model.layers.0.mlp.gate": {"bits": 16, "data_type": "float"}},
    "gradient_accumulate_steps": 1,
    "group_size": 128,
    "iters": 200,
    "low_gpu_mem_usage": False,
    "lr": 0.005,
    "minmax_lr": 0.005,
    "nsamples": 128,
    "packing_format": "auto_round:auto_gptq",
    "quant_method": "auto-round",
    "scale_dtype": "torch.float16",
    "seqlen": 2048,
    "supported_types": ["Linear", "Conv1D"],
    "sym": True,
}
MODELOPT_CODES = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
FP8 = {"activation_scheme": "dynamic", "quant_method": "fp8", "weight_block_size": [128, 128]}


def torchao(name: str, **fields: Any) -> dict[str, Any]:
    """Make a config of torchao as transformers writes it."""
    return {
        "include_input_output_embeddings": False,
        "modules_to_not_convert": None,
        "quant_method": "torchao",
        "quant_type": {"default": {"_data": fields, "_type": name, "_version": 2}},
        "untie_embedding_weights": False,
    }


PER_ROW = {"_data": {"dim": -1}, "_type": "PerRow", "_version": 1}
INT4 = codes(group_size=128, num_bits=4, strategy="group", type="int")
FLOAT8 = codes(num_bits=8, strategy="channel", type="float")
NVFP4 = codes(
    group_size=16, num_bits=4, strategy="tensor_group", type="float", scale_dtype="torch.float8_e4m3fn"
)
OLD = {
    "dynamic": False,
    "num_bits": 8,
    "strategy": "tensor",
    "symmetric": True,
    "type": "float",
    "observer": "minmax",
}
TOKEN_FP8 = codes(dynamic=True, num_bits=8, strategy="token", type="float", observer=None)

CONFIGS: dict[str, dict[str, Any]] = {
    "awq: Qwen2.5-7B-Instruct-AWQ": {**AWQ, "modules_to_not_convert": None},
    "awq: Qwen2.5-VL-7B-Instruct-AWQ": {**AWQ, "modules_to_not_convert": ["visual"]},
    "awq: TheBloke's": {
        "zero_point": True,
        "q_group_size": 128,
        "w_bit": 4,
        "version": "GEMM",
        "quant_method": "awq",
    },
    "awq: transformers 4.40": {
        **AWQ,
        "backend": "autoawq",
        "do_fuse": False,
        "exllama_config": None,
        "fuse_max_seq_len": None,
        "modules_to_fuse": None,
        "modules_to_not_convert": ["gate"],
    },
    "awq: GPTQModel 7.6.0": {
        **AWQ,
        "checkpoint_format": "gemm",
        "desc_act": False,
        "format": "gemm",
        "lm_head": False,
        "meta": {
            "fallback": None,
            "quantizer": ["gptqmodel:7.6.0"],
            "scale_search_chunked_activations": True,
        },
        "method": "awq",
        "pack_dtype": "int32",
        "sym": False,
    },
    "awq: AutoRound 0.16.1": {
        **AWQ,
        "amp": False,
        "autoround_version": "0.16.1",
        "data_type": "int",
        "iters": 0,
        "modules_to_not_convert": ["lm_head"],
        "provider": "auto-round",
        "sym": False,
        "to_quant_block_names": "model.layers",
    },
    "awq: community conversions": {**AWQ, "modules_to_not_convert": ["lm_head"], "ignore": ["lm_head"]},
    "gptq: Qwen2.5-Coder-1.5B-Instruct-GPTQ-Int4": TRANSFORMERS_GPTQ,
    "gptq: Qwen3-30B-A3B-GPTQ-Int4": {**AUTOGPTQ, "checkpoint_format": "gptq", "model_file_base_name": None},
    "gptq: TheBloke's": AUTOGPTQ,
    "gptq: GPTQModel 7.6.0": {
        "bits": 4,
        "checkpoint_format": "gptq",
        "desc_act": True,
        "dynamic": {"-:.*gate$": {}, "+:.*down_proj.*": {"bits": 8, "group_size": 64, "mse": 2.4}},
        "format": "gptq",
        "group_size": 128,
        "lm_head": False,
        "meta": META,
        "method": "gptq",
        "pack_dtype": "int32",
        "quant_method": "gptq",
        "sym": True,
    },
    "gptq: GPTQModel 1.4": {
        "bits": 4,
        "checkpoint_format": "gptq",
        "damp_auto_increment": 0.0015,
        "damp_percent": 0.1,
        "desc_act": True,
        "dynamic": None,
        "group_size": 32,
        "lm_head": False,
        "meta": {"quantizer": ["gptqmodel:1.4.5"], "damp_percent": 0.1, "mse": 0.0, "parallel_packing": True},
        "quant_method": "gptq",
        "sym": True,
        "true_sequential": True,
    },
    "gptq: AutoRound 0.16.1": {
        "amp": False,
        "autoround_version": "0.16.1",
        "bits": 4,
        "damp_percent": 0.01,
        "data_type": "int",
        "desc_act": False,
        "enable_quanted_input": False,
        "group_size": 128,
        "iters": 0,
        "lm_head": False,
        "provider": "auto-round",
        "quant_method": "gptq",
        "sym": True,
        "true_sequential": False,
    },
    "auto-round: Intel's": AUTOROUND,
    "auto-round: 0.14 without a model": {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
        "bits": 4,
        "group_size": 128,
        "sym": True,
        "data_type": "int",
        "iters": 0,
        "model_free": True,
        "autoround_version": "0.14.2",
        "extra_config": {"lm_head": {"bits": 16, "data_type": "float"}},
    },
    "auto-round: MXFP4": {
        "bits": 4,
        "act_bits": 4,
        "data_type": "mx_fp",
        "act_data_type": "mx_fp",
        "group_size": 32,
        "act_group_size": 32,
        "sym": True,
        "act_sym": True,
        "act_dynamic": True,
        "iters": 0,
        "autoround_version": "0.12.3",
        "quant_method": "auto-round",
        "packing_format": "auto_round:llm_compressor",
    },
    "bitsandbytes: unsloth's 4 bits": BITSANDBYTES,
    "bitsandbytes: 8 bits": {
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": False,
        "load_in_8bit": True,
        "quant_method": "bitsandbytes",
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": False,
    },
    "compressed-tensors: RedHatAI w4a16": compressed("pack-quantized", INT4),
    "compressed-tensors: w4a16 in act order": compressed("pack-quantized", {**INT4, "actorder": "group"}),
    "compressed-tensors: w4a16 by mse": compressed(
        "pack-quantized",
        {
            **INT4,
            "actorder": "weight",
            "observer": "mse",
            "observer_kwargs": {"maxshrink": 0.2, "patience": 5},
        },
    ),
    "compressed-tensors: RedHatAI w8a8": compressed(
        "int-quantized",
        codes(num_bits=8, strategy="channel", type="int", observer="mse"),
        codes(dynamic=True, num_bits=8, strategy="token", type="int", observer="memoryless"),
        sparsity_config={
            "format": "dense",
            "global_sparsity": 0.1439,
            "ignore": [],
            "sparsity_structure": "dense",
        },
    ),
    "compressed-tensors: RedHatAI FP8-dynamic": compressed("float-quantized", FLOAT8, TOKEN_FP8),
    "compressed-tensors: neuralmagic FP8 of 2024": compressed(
        "naive-quantized", OLD, OLD, kv_cache_scheme=OLD, quantization_status="frozen"
    ),
    "compressed-tensors: the cache alone": {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "quantization_status": "frozen",
        "config_groups": {},
        "ignore": [],
        "kv_cache_scheme": codes(dynamic=False, num_bits=8, strategy="tensor", symmetric=True, type="float"),
    },
    "compressed-tensors: FP8 of blocks": compressed(
        "float-quantized",
        codes(block_structure=[128, 128], num_bits=8, strategy="block", type="float"),
        codes(dynamic=True, group_size=128, num_bits=8, strategy="group", type="float", observer=None),
        kv_cache_scheme=codes(num_bits=8, strategy="tensor", type="float"),
    ),
    "compressed-tensors: RedHatAI NVFP4": compressed(
        "nvfp4-pack-quantized", NVFP4, {**NVFP4, "dynamic": "local"}
    ),
    "fbgemm-fp8: Meta-Llama-3.1-405B-Instruct-FP8": {
        "activation_scale_ub": 1200.0,
        "modules_to_not_convert": ["model.layers.0.mlp.down_proj"],
        "quant_method": "fbgemm_fp8",
    },
    "fp8: DeepSeek-V3": {**FP8, "fmt": "e4m3"},
    "fp8: DeepSeek-V3.1": {**FP8, "fmt": "e4m3", "scale_fmt": "ue8m0"},
    "fp8: MiniMax-M2": {**FP8, "fmt": "float8_e4m3fn", "modules_to_not_convert": ["gate", "lm_head"]},
    "fp8: Qwen3-8B-FP8": {**FP8, "fmt": "e4m3", "modules_to_not_convert": None},
    "fp8: Qwen3.5-35B-A3B-FP8": {
        **FP8,
        "weight_per_tensor": False,
        "act_per_tensor": False,
        "scale_fmt": "float",
    },
    "fp8: transformers 5.23": {
        **FP8,
        "dequantize": False,
        "expert_dtype": "fp8",
        "modules_to_convert": None,
        "modules_to_not_convert": None,
        "scale_fmt": "float",
    },
    "fp8: Ministral-3": {
        **FP8,
        "activation_scheme": "static",
        "weight_block_size": None,
        "dequantize": False,
    },
    "fp8: AutoFP8": {
        "activation_scheme": "static",
        "ignored_layers": ["lm_head"],
        "kv_cache_scheme": "static",
        "quant_method": "fp8",
    },
    "fp8: a cache's scheme": {**FP8, "kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": False}},
    "fp8: GPTQModel 7.6.0": {
        "bits": 8,
        "checkpoint_format": "float8_e4m3fn",
        "desc_act": False,
        "dynamic": {"-:.*gate$": {}},
        "format": "float8_e4m3fn",
        "group_size": -1,
        "lm_head": False,
        "meta": {
            "act_group_aware": None,
            "mse": None,
            "quantizer": ["gptqmodel:7.6.0"],
            "telemetry": {"device": False},
        },
        "method": "fp8",
        "pack_dtype": "int32",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
        "weight_scale_method": "block",
        "weight_scale_semantics": "inverse",
    },
    "gguf: made of a file's types": {
        "quant_method": "gguf",
        "types": {"model.layers.0.mlp.down_proj": "Q4_K"},
    },
    "hqq: transformers": {"quant_config": HQQ_PARAMS, "quant_method": "hqq", "skip_modules": ["lm_head"]},
    "hqq: by tag": {
        "quant_config": {"self_attn.q_proj": HQQ_PARAMS, "mlp.down_proj": HQQ_PARAMS},
        "quant_method": "hqq",
        "skip_modules": ["lm_head"],
    },
    "modelopt: nvidia Llama-3.1-8B-Instruct-FP8": {
        "producer": {"name": "modelopt", "version": "0.29.0"},
        "quantization": {"exclude_modules": ["lm_head"], "kv_cache_quant_algo": "FP8", "quant_algo": "FP8"},
        "quant_method": "modelopt",
    },
    "modelopt: nvidia Llama-3.3-70B-Instruct-NVFP4": {
        "producer": {"name": "modelopt", "version": "0.33.0"},
        "quantization": {
            "exclude_modules": ["lm_head"],
            "group_size": 16,
            "kv_cache_quant_algo": None,
            "quant_algo": "NVFP4",
        },
        "quant_method": "modelopt",
    },
    "modelopt: config.json of nvidia's NVFP4": {
        "config_groups": {
            "group_0": {"input_activations": MODELOPT_CODES, "weights": MODELOPT_CODES, "targets": ["Linear"]}
        },
        "ignore": ["lm_head"],
        "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
        "producer": {"name": "modelopt", "version": "0.41.0"},
        "quant_algo": "NVFP4",
        "quant_method": "modelopt",
    },
    "modelopt: mixed precision": {
        "producer": {"name": "modelopt", "version": "0.39.0"},
        "quantization": {
            "kv_cache_quant_algo": "FP8",
            "quant_algo": "MIXED_PRECISION",
            "quantized_layers": {
                "model.layers.0.mlp.up_proj": {
                    "quant_algo": "NVFP4",
                    "group_size": 16,
                    "has_zero_point": False,
                },
                "model.layers.0.self_attn.q_proj": {"quant_algo": "FP8"},
            },
        },
        "quant_method": "modelopt",
    },
    "mxfp4: gpt-oss-20b": {
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
        "quant_method": "mxfp4",
    },
    "mxfp8: MiniMax-M3": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "modules_to_not_convert": ["lm_head"],
        "quant_method": "mxfp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [1, 32],
    },
    "none: a name without settings": {"quant_method": "none"},
    "quark: amd's FP8-KV": QUARK,
    "quark: by the type of layers": {
        "quant_method": "quark",
        "export": {"pack_method": "reorder", "weight_format": "real_quantized"},
        "global_quant_config": {"weight": {"dtype": "int8", "qscheme": "per_channel"}},
        "layer_type_quant_config": {
            "Linear": {
                **QUARK_SCHEME,
                "input_tensors": quark(is_dynamic=True, qscheme="per_channel", ch_axis=1),
            }
        },
    },
    "torchao: Int8WeightOnly": torchao(
        "Int8WeightOnlyConfig", granularity=PER_ROW, group_size=None, set_inductor_config=True
    ),
    "torchao: Int8DynamicActivationInt8Weight": torchao(
        "Int8DynamicActivationInt8WeightConfig",
        act_mapping_type={"_type": "MappingType", "_data": "SYMMETRIC"},
        granularity=[PER_ROW, PER_ROW],
        reduce_range=False,
        set_inductor_config=True,
        weight_only_decode=False,
    ),
    "torchao: Int4WeightOnly": torchao(
        "Int4WeightOnlyConfig",
        group_size=128,
        int4_choose_qparams_algorithm={"_type": "Int4ChooseQParamsAlgorithm", "_data": "TINYGEMM"},
        int4_packing_format={"_type": "Int4PackingFormat", "_data": "PLAIN"},
        int4_tile_packed_ntile=8,
        set_inductor_config=True,
    ),
    "torchao: Float8DynamicActivationFloat8Weight": torchao(
        "Float8DynamicActivationFloat8WeightConfig",
        activation_dtype={"_type": "torch.dtype", "_data": "float8_e4m3fn"},
        activation_value_lb=None,
        activation_value_ub=None,
        granularity=[PER_ROW, PER_ROW],
        kernel_preference={"_type": "KernelPreference", "_data": "AUTO"},
        mm_config=None,
        packing_format={"_type": "Float8PackingFormat", "_data": "PLAIN"},
        set_inductor_config=True,
        weight_dtype={"_type": "torch.dtype", "_data": "float8_e4m3fn"},
    ),
    "torchao: Int8DynamicActivationIntxWeight": torchao(
        "Int8DynamicActivationIntxWeightConfig",
        act_mapping_type={"_type": "MappingType", "_data": "ASYMMETRIC"},
        intx_choose_qparams_algorithm={"_type": "IntxChooseQParamsAlgorithm", "_data": "AFFINE"},
        intx_packing_format={"_type": "IntxPackingFormat", "_data": "UNPACKED_TO_INT8"},
        weight_dtype=TORCH_INT8,
        weight_granularity={"_type": "PerGroup", "_version": 1, "_data": {"group_size": 32}},
        weight_mapping_type={"_type": "MappingType", "_data": "SYMMETRIC"},
        weight_scale_dtype=None,
    ),
}
OBJECTS_BY_NAME = (
    "config_groups",
    "dynamic",
    "extra_config",
    "layer_quant_config",
    "layer_type_quant_config",
    "quantization.quantized_layers",
    "quant_config",
    "quant_type",
    "transform_config",
    "types",
)
