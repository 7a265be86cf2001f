"""One attempt at training, from the newest checkpoint to the end or to a stop. Runs under Ray and torchrun.

AttemptSpec ─▶ train ─▶ Attempt.fit:  batch ─▶ forward, backward, update ─▶ hooks ─▶ evaluate? commit?
                          │                                                           │
                          └── data: the feed, the held-out sets                  └── checkpoint, ledger
                                                                    at the end: export ─▶ model/

loop           the loop itself
hooks          what happens around it: the protocol, a user's own, stop requests, keeping the best model
records        the hook that writes metrics.jsonl, and its figures
peak           what a device computes at most, by its name
phases         where the seconds of an attempt go
beat           a rank's signs of life, and its stacks
progress       what rank 0 is doing, for whoever shows the run
profiler       the hook that writes a trace of a few steps
checkpoint     where a run stands, what counts as saved
commit_request a checkpoint that another process asks for
behind         whether there is memory to write checkpoints while training goes on
ledger         the chain of lines, one per commit: checked, and made whole again from COMMITs
evaluate       loss, perplexity and bits per byte of the held-out sets
schedule       the learning rate of a step
collate        the user's function between the feed and the model
copies         micro batches reach a GPU ahead of their step
norms          ends an attempt whose gradients are no numbers, without making a GPU wait
guard          which steps are bad, by the losses and norms of those before
skips          what an attempt does about them: skip, record, go back to a checkpoint, end
suspects       the documents of a bad batch that stand out
shard_check    verifies the shards that are read, in the background
data           opens what an attempt reads
memory         errors that mean out of memory; how much memory was taken
room           what a worker needs by the estimate and what its device has; what would fit
micro_batch    finds the largest micro batch that fits a GPU, by trying
export, card   model/ and its README.md
attempt_spec   what an attempt needs to know, the same on every rank; its result
torchrun       the process group and signals of a rank without Ray; run/torchrun.py uses it
"""
