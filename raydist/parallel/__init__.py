"""A model and its optimizer, spread over ranks. The loop sees `Strategy` alone.

build_on_ranks ─▶ model ─▶ make_strategy ─▶ Strategy: forward_backward, update, save, load, gather_full
                                               ├── ddp     the whole model on every rank
                                               ├── fsdp    PyTorch's FSDP2
                                               └── zero    DeepSpeed ZeRO, stages 1 to 3

strategy    the protocol, and the handle of a checkpoint that is being written
build       from a job to a model on every rank, and the strategy that the job names
world       this rank among the others, and the sums they take
weights     from rank 0's weights to shards, without a whole copy on each rank
loss_scale  what fp16 needs: a factor of the loss, and steps that are skipped
optimizer   which optimizer a job has, and its step: norm, clipping, learning rate
footprint   the memory that a worker needs, by part: an estimate
share       which rank writes what of a checkpoint, and the format of its file
saver       writes that file, at once or from a copy in host memory while training goes on
state       weights and optimizer state by name in safetensors, one format for every strategy
"""
