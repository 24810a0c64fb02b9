"""Any decoder: transformers' own class as the model definition, with our layers in it.

For a model type without a page in `pymllm.models`, or any with `definition="transformers"`. The class is built on the
meta device (`classes.py`) and run there once, to see how its modules are called (`probe.py`); our layers take the place
of what holds weights (`layers.py`, `experts.py`), attention runs over our pages (`attention.py`), and recurrences over
our states (`recurrences.py`). What cannot be run for several requests side by side, an attention of the class's own for
example, runs a request at a time over transformers' own cache (`request_cache.py`). Code that a checkpoint brings along
is never run.
"""
