"""What writers note beside the settings that readers need, for several formats: names, and why they are harmless.

Each table is a writer's, or a part that several formats have.  Formats put theirs together, beside their readers.
"""

from __future__ import annotations

from pymllm.quantization.storage.settings import below, harmless

SWITCH = (False, True)
CALIBRATION = "how the writer found the codes"
PROCESS = "how the writer ran"
RUNNING = "how another engine is to run it"
REFUSED = "what it asks for is not done here"

# GPTQModel's `meta`, which it says no reader needs; AutoGPTQ and older releases have some of it beside `bits`.
GPTQ_CALIBRATION = {
    **harmless(
        CALIBRATION,
        *(
            "damp_percent",
            "damp_auto_increment",
            "static_groups",
            "true_sequential",
            "mse",
            "gptaq",
            "gptaq_alpha",
        ),
        *("foem", "act_group_aware", "hyb_act", "v2", "v2_alpha", "v2_memory_device", "mock_quantization"),
        *("scale_search_chunked_activations", "fail_safe", "failsafe", "failsafe_with_rtn"),
        *(f"gptaq.{name}" for name in ("alpha", "device")),
        *(f"foem.{name}" for name in ("alpha", "beta", "device")),
        *(f"fallback.{name}" for name in ("strategy", "threshold")),
        *(
            f"fallback.smooth.{name}"
            for name in ("type", "name", "group_size_threshold", "axis", "percentile")
        ),
        *(f"fallback.smooth.{name}" for name in ("k", "q_lo", "q_hi", "steps", "p", "shrink", "num_samples")),
        *(
            f"hessian.{name}"
            for name in ("chunk_size", "chunk_bytes", "staging_dtype", "dedup_shared_inputs")
        ),
    ),
}
GPTQMODEL_META = below(
    "meta",
    {
        **GPTQ_CALIBRATION,
        **harmless("the writer's name and version", "quantizer", "uri", "packer"),
        **harmless(
            PROCESS,
            *("offload_to_disk", "offload_to_disk_path", "pack_impl", "gc_mode", "vram_strategy"),
            *("wait_for_submodule_finalizers", "auto_forward_data_parallel", "dense_vram_strategy"),
            *(
                "dense_vram_strategy_devices",
                "moe_vram_strategy",
                "moe_vram_strategy_devices",
                "telemetry.device",
            ),
            *(
                "parallel_packing",
                "compute_device_filter",
                "moe.routing.class",
                "moe.routing.num_experts_per_tok",
            ),
            *("moe.routing.batch_size",),
        ),
        **harmless(
            "how the floats were read before they were rounded",
            *(f"preprocessors.*.{name}" for name in ("code", "smooth", "source_dtype", "target_dtype")),
            *(f"preprocessors.*.passthrough_{name}_policy" for name in ("forward", "save")),
        ),
    },
)
GPTQMODEL = {
    **GPTQMODEL_META,
    **harmless(
        "a head is quantised where the files hold codes of it", "lm_head", "quant_lm_head", only=SWITCH
    ),
    **harmless("inputs are multiplied as the rest of the checkpoint's", "backend"),
    **harmless(f"a rotation that the model undoes while it runs; {REFUSED}", "rotation", only=()),
    **harmless(f"activations that are rounded while the model runs; {REFUSED}", "activation", only=()),
}

# AutoRound, in whichever format it exports.
AUTOROUND = {
    **harmless("the writer's name and version", "autoround_version", "provider"),
    **harmless(
        CALIBRATION,
        *("amp", "batch_size", "train_bs", "enable_minmax_tuning", "enable_norm_bias_tuning"),
        *("enable_quanted_input", "use_quant_input", "gradient_accumulate_steps", "iters", "lr", "minmax_lr"),
        *(
            "nsamples",
            "n_samples",
            "seqlen",
            "dataset",
            "not_use_best_mse",
            "dynamic_max_gap",
            "sampler",
            "seed",
        ),
        *("lr_scheduler", "nblocks", "damp_percent", "true_sequential", "disable_opt_rtn"),
    ),
    **harmless(
        PROCESS, "low_gpu_mem_usage", "low_cpu_mem_usage", "supported_types", "quant_block_list", "model_type"
    ),
    **harmless("scales are read in the dtype that they are stored in", "scale_dtype"),
    **harmless("of scales that are not asked for", "static_kv_granularity", "static_attention_granularity"),
    **harmless(RUNNING, "backend"),
}

# What transformers and AutoGPTQ write beside the settings of GPTQ's readers.
TRANSFORMERS_GPTQ = {
    **GPTQ_CALIBRATION,
    **harmless(
        PROCESS,
        *("tokenizer", "dataset", "batch_size", "pad_token_id", "model_seqlen", "max_input_length"),
        *("cache_block_outputs", "block_name_to_quantize", "module_name_preceding_first_block"),
        *("model_name_or_path", "model_file_base_name", "quantizer", "autogptq_version"),
    ),
    **harmless(
        RUNNING,
        *(
            "use_cuda_fp16",
            "use_exllama",
            "disable_exllama",
            "exllama_config.version",
            "exllama_config.max_input_len",
        ),
        *("exllama_config.max_batch_size", "use_triton", "backend"),
    ),
}

# A `kv_cache_scheme`, or another of compressed-tensors' descriptions of codes, whose codes the reader makes itself.
OBSERVERS = harmless(
    CALIBRATION,
    "observer",
    *(
        f"observer_kwargs.{name}"
        for name in ("averaging_constant", "maxshrink", "patience", "grid", "norm", "expand")
    ),
    *(
        f"observer_kwargs.{name}"
        for name in ("triton_error_buffer", "strict", "global_scale", "maxgrow", "maxiter")
    ),
)
KV_SCHEME = {
    **harmless("read when the cache is made", "type", "num_bits", "symmetric", "dynamic", "strategy"),
    **harmless(
        "a scale of the tensor or head has neither", "group_size", "block_structure", "actorder", only=()
    ),
    **harmless("scales are read in the dtype that they are stored in", "scale_dtype"),
    **harmless("a symmetric cache has no zero points", "zp_dtype"),
    **OBSERVERS,
}
