"""A rank that runs what rank 0 says: the same forwards, of the same model, without requests of its own.

What others build on (Ray, a script of one's own):

    from pymllm.follower import follow
    follow("path/to/model", rank=1, size=4, host="10.0.0.1", port=29500, key="a secret", device="cpu")

runs in any process, in its main thread or another, until rank 0 tells it to end, and then returns. The arguments after
`key` are those of `LLM`; ranks that would load something else are refused, on all sides, before a tensor is read. Where
rank 0 ends, however it does, or is silent for `SILENCE` seconds, the process of a follower ends at once (exit code
`LOST`): a thread that waits in a collective cannot be told otherwise. Rank 0 is

    llm = LLM("path/to/model", tensor_parallel_size=4, device="cpu",
              ranks=Ranks(host="10.0.0.1", port=29500, key="a secret", started=0))

which returns once all ranks have loaded. `llm.why_not_healthy()` is None, or why the ranks can answer no more: a rank
has ended, is silent, or has failed. It costs nothing; `llm.ping()` asks every rank and returns how many seconds ago
each was last heard of. What is lost stays lost: start all ranks again. `llm.close()` ends the followers.
"""
