"""The settings of torchao that may be left unread: of its config classes, and of the attributes that metadata gives.

torchao spells an object of a class, or a value of an enumeration, {"_type": ..., "_version": ..., "_data": ...}.
"""

from __future__ import annotations

from pymllm.quantization.storage.settings import below, harmless
from pymllm.quantization.storage.writer_settings import CALIBRATION, REFUSED, RUNNING, STORED_LAYER, SWITCH

# Fields that the reader may ask for, later than the settings are checked.
READ_LATER = ("target_dtype", "weight_dtype", "activation_quantization", "act_quant_kwargs")

_VALUE = harmless("a value, in torchao's spelling", "_type _version _data")
_GRANULARITY = {
    **harmless("the shape of the scales says so", "_type _version"),
    **below("_data", harmless("the shape of the scales says so", "dim group_size axis block_size")),
}
_MATMUL = below("_data", harmless(RUNNING, "emulate use_fast_accum pad_inner_dim"))
_RANGE = {
    **harmless(f"activations have fewer codes, {REFUSED}", "reduce_range", only=(False,)),
    **harmless(f"activations have bounds, {REFUSED}", "activation_value_lb activation_value_ub", only=()),
    **harmless(f"activations have bounds, {REFUSED}", "hp_value_lb hp_value_ub", only=()),
}
_RUNNING = {
    **harmless(RUNNING, "set_inductor_config int4_tile_packed_ntile weight_only_decode alg_id inner_k_tiles"),
    **below("kernel_preference layout mm_config", _VALUE),
    **below("mm_config", _MATMUL),
}
_ACTIVATIONS = {  # act_quant_kwargs: how activations are rounded
    **harmless("the class of the weight says so", "_type _version"),
    **below("_data.granularity", _GRANULARITY),
    **below("_data.mapping_type _data.float8_dtype", _VALUE),
    **below("_data", _RANGE, _RUNNING),
}
# Of the classes of weights, by the files' metadata.
_ATTRIBUTES = {
    **below("target_dtype weight_dtype activation_quantization dtype", _VALUE),
    **below("act_quant_kwargs", _ACTIVATIONS),
    **harmless("the layer has its own shape", "block_size shape"),
    **harmless("what the weight had before it was rounded", "dtype"),
    **harmless("activations stay floats", "activation_dtype._type activation_dtype._version"),
    **harmless("activations stay floats", "activation_dtype._data", only=("bfloat16", "float16", "float32")),
    **_RANGE,
    **_RUNNING,
}
# Of the config classes; the files' metadata and tensors have the last word on all of them.
_FIELDS = {
    **below("granularity weight_granularity granularity.[0] granularity.[1]", _GRANULARITY),
    **harmless("the shapes of the tensors say so", "group_size version"),
    **below("mapping_type weight_mapping_type act_mapping_type scale_dtype weight_scale_dtype", _VALUE),
    **below("packing_format int4_packing_format intx_packing_format", _VALUE),
    **below("int4_choose_qparams_algorithm intx_choose_qparams_algorithm", _VALUE),
    **below("activation_dtype", _VALUE),
    **harmless(CALIBRATION, "use_hqq"),
}
METADATA_HARMLESS = {
    **below("_data", _ATTRIBUTES),
    **harmless("the tensors that are stored have these names", "_tensor_data_names"),
    **harmless("the class of the weight has one layout", "_version"),
}
HARMLESS = {
    **below("quant_type.default", harmless("read with a layer that has no metadata", "_type _version")),
    **below("quant_type.default._data", _ATTRIBUTES, _FIELDS),
    **harmless(STORED_LAYER, "include_input_output_embeddings untie_embedding_weights", only=SWITCH),
}
