"""Writing checkpoints.

The entry: `quantize_checkpoint.py`. The layers there are: `layers.py`. How layers are spelled: `spelling.py`, and one
file a spelling. The files beside the weights: `side_files.py`. Files that appear whole or not at all: `output.py`. All
of it, step by step: `checkpoint_writer.py`. With calibration text: `calibrated.py`, which runs `float_model.py`.
"""
