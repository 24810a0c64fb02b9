"""The first contact of the kernels with a GPU: are they right, do models answer, how fast; in one call of some minutes.

    python3 -m benchmarks.first_contact                      in the root of a clone
    python3 -m benchmarks.first_contact --rehearse           without a GPU, in Triton's interpreter
    python3 -m benchmarks.first_contact --stages "env checks"

It needs Python with torch and triton, and what pymllm imports for a model in a folder (numpy, tokenizers, tqdm); pytest
for the stage `tests`. docs/gpu.md, "First contact", says how to read what it prints.

`stages.py` lists what is done, `driver.py` runs it: each stage in processes of its own, which `part.py` starts,
watches and ends. `notes.py` is how these say what they found, `summary.py` what is printed. Everything else is a stage.
"""
