"""Attention that does not cross the documents of a packed block.

A batch says how long its documents are (`document_lengths`), and its position_ids restart at each. SDPA and
eager attention need the positions alone: transformers makes its mask of them. Others get the lengths, by a
hook on the model, once for all layers.

choose        the fastest kind that a device and a model have, or the one that was asked for
probe         the proof, on a small batch, that no token sees another document or the future
documents     hands the lengths of documents to the attention, as that takes them; masks: puts them into
              the masks of models that do not find them in their positions
layers        what the layers ask for: a window, sinks
function      what attention functions of our own have in common
per_document  on CPU: one causal call per document, which is faster than a mask
flex          on GPUs: FlexAttention with a mask of blocks, also for windows and sinks
"""
