"""What a Hugging Face model is here: made, given its attention, run, written. Nothing of several processes.

job, tokenizer ─▶ build ─▶ model ─▶ loss_of(model, batch) ─▶ ... trained ... ─▶ export ─▶ model/
                   │  ▲
   base: weights ──┘  └── attention: the fastest that keeps documents apart, proven by a probe
                          adapter, quantization: a frozen base and LoRA on it

build          configuration, model in memory, its sizes; what cannot be used is refused here
trust          what a base may decide: no code, no pickle, no size that fits no machine
base           a base's weights: loaded, and refused where they are not those of its configuration
attention      kinds of attention, which one a device takes, the probe that tokens see no other document
layers         the decoder layers of any architecture, the text side of a multimodal one, its settings
loss           the loss of (model, batch), summed over labels; router: the own loss of a mixture's router
head           the loss of a large vocabulary without its logits, and what a model does behind its head
cross_entropy  a summed loss and its gradient, some rows of logits at a time
compiled       layers compiled in place by torch.compile
adapter        LoRA by peft
work           how many operations a step takes
kept           what a forward pass keeps in memory for the backward pass
quantization   a frozen base in 4 or 8 bits by bitsandbytes; quantized: its bytes, and a linear layer of them;
               experts: those of a mixture as bytes
export         a Hugging Face folder: written, loaded again, sampled from, merged
"""
