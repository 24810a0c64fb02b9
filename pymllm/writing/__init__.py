"""Writing checkpoints.

How layers are spelled: `spelling.py`, and one file a spelling. Which layers there are: `layers.py`. What lies beside
the weights: `side_files.py`. Files that appear whole or not at all: `output.py`. All of it, step by step:
`checkpoint_writer.py`.
"""
