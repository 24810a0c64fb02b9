"""What writers note beside the settings that readers need, for several formats: names, and why they are harmless.

Each table is a writer's, or a part that several formats have.  Formats put theirs together, beside their readers.
"""

from __future__ import annotations

from pymllm.quantization.storage.settings import below, harmless

SWITCH = (False, True)
CALIBRATION = "how the writer found the codes"
PROCESS = "how the writer ran"
RUNNING = "how another engine is to run it"
WRITER = "the writer's name and version"
STORED_DTYPE = "scales and zero points are read in the dtype that they are stored in"
STORED_LAYER = "a layer is quantised where the files hold codes of it"
REFUSED = "which is not done here"

# Settings of GPTQ's algorithm.  GPTQModel has them in `meta`, AutoGPTQ and older releases beside `bits`.
GPTQ_CALIBRATION = {
    **harmless(
        CALIBRATION,
        "damp_percent damp_auto_increment static_groups true_sequential mse act_group_aware hyb_act",
        "gptaq_alpha v2 v2_alpha v2_memory_device hessian_chunk_size mock_quantization",
        "fail_safe failsafe failsafe_with_rtn scale_search_chunked_activations",
    ),
    **harmless(CALIBRATION, "gptaq foem", only=SWITCH),
    **below("gptaq foem", harmless(CALIBRATION, "alpha beta device")),
    **below("fallback", harmless(CALIBRATION, "strategy threshold")),
    **below(
        "fallback.smooth",
        harmless(
            CALIBRATION,
            "type name group_size_threshold axis percentile k q_lo q_hi steps p shrink num_samples",
        ),
    ),
    **below("hessian", harmless(CALIBRATION, "chunk_size chunk_bytes staging_dtype dedup_shared_inputs")),
}
GPTQMODEL_META = {
    **GPTQ_CALIBRATION,
    **harmless(WRITER, "quantizer uri packer"),
    **harmless(
        PROCESS,
        "offload_to_disk offload_to_disk_path pack_impl gc_mode wait_for_submodule_finalizers parallel_packing",
        "auto_forward_data_parallel compute_device_filter telemetry.device vram_strategy",
        "dense_vram_strategy dense_vram_strategy_devices moe_vram_strategy moe_vram_strategy_devices",
        "moe.routing.class moe.routing.num_experts_per_tok moe.routing.batch_size",
    ),
    **below(
        "preprocessors.*",
        harmless("what the writer did with floats", "code smooth source_dtype target_dtype"),
        harmless("what the writer did with floats", "passthrough_forward_policy passthrough_save_policy"),
    ),
}
GPTQMODEL = {
    **below("meta", GPTQMODEL_META),
    **harmless(STORED_LAYER, "lm_head quant_lm_head", only=SWITCH),
    **harmless(RUNNING, "backend"),
    **harmless(f"a rotation is undone while the model runs, {REFUSED}", "rotation", only=()),
    **harmless(f"activations are rounded while the model runs, {REFUSED}", "activation", only=()),
}

# AutoRound, in whichever format it exports.
AUTOROUND = {
    **harmless(WRITER, "autoround_version provider"),
    **harmless(
        CALIBRATION,
        "amp batch_size train_bs enable_minmax_tuning enable_norm_bias_tuning enable_quanted_input use_quant_input",
        "gradient_accumulate_steps iters lr minmax_lr lr_scheduler nsamples n_samples seqlen dataset sampler seed",
        "nblocks not_use_best_mse dynamic_max_gap disable_opt_rtn damp_percent true_sequential",
    ),
    **harmless(PROCESS, "model_free low_gpu_mem_usage low_cpu_mem_usage supported_types"),
    **harmless(PROCESS, "quant_block_list to_quant_block_names"),
    **harmless(STORED_DTYPE, "scale_dtype"),
    **harmless("of scales that are not asked for", "static_kv_granularity static_attention_granularity"),
    **harmless(RUNNING, "backend"),
}

# What transformers and AutoGPTQ write beside the settings of GPTQ.
TRANSFORMERS_GPTQ = {
    **GPTQ_CALIBRATION,
    **harmless(
        PROCESS,
        "tokenizer dataset batch_size pad_token_id model_seqlen max_input_length cache_block_outputs",
        "block_name_to_quantize module_name_preceding_first_block model_name_or_path model_file_base_name",
    ),
    **harmless(
        RUNNING,
        "use_cuda_fp16 use_exllama disable_exllama use_triton backend",
        "exllama_config.version exllama_config.max_input_len exllama_config.max_batch_size",
    ),
}

OBSERVERS = {
    **harmless(CALIBRATION, "observer"),
    **below(
        "observer_kwargs",
        harmless(
            CALIBRATION, "averaging_constant maxshrink patience grid norm expand triton_error_buffer strict"
        ),
        harmless(CALIBRATION, "global_scale maxgrow maxiter"),
    ),
}
# A `kv_cache_scheme`, as compressed-tensors writes it and others do after it.
KV_SCHEME = {
    **OBSERVERS,
    **harmless("read when the cache is made", "type num_bits symmetric dynamic strategy"),
    **harmless("a scale is that of the tensor, or of a head", "group_size block_structure actorder", only=()),
    **harmless(STORED_DTYPE, "scale_dtype zp_dtype"),
}
