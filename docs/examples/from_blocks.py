"""The same blocks as a Ray Dataset, for any program that reads one: `python from_blocks.py JOB_OR_RUN`."""

import sys

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import raydist


def train(run: str, steps: int = 5) -> list[float]:
    dataset = raydist.blocks(raydist.load_job(run) if run.endswith(".yaml") else run, start=0, stop=8 * steps)
    config = AutoConfig.for_model("llama", vocab_size=4096, hidden_size=64, num_hidden_layers=2)
    model = AutoModelForCausalLM.from_config(config)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for batch in dataset.iter_torch_batches(batch_size=8):
        logits = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print(train(sys.argv[1]))
