"""Run under torchrun on 4 ranks: train the same batch in every layout and write what each layout computed.

Usage: layout_worker.py CASES.json OUT.pt; a case is {name, folder, tensor, pipeline, data, sequence, micro_batch_tokens, precision}.
"""

import json
import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_ext import platform

platform.activate("cpu")


from megatron_ext import hf_checkpoint, model, optimizer, packing, parallel, steps  # noqa: E402
from megatron_ext.blocks import region  # noqa: E402

SETTINGS = optimizer.OptimizerSettings(
    learning_rate=1e-3,
    minimum_fraction=0.1,
    warmup_fraction=0.0,
    decay="constant",
    betas=(0.9, 0.95),
    epsilon=1e-8,
    weight_decay=0.01,
    clip_grad_norm=1.0,
)


def sequences(vocab: int) -> list[packing.PackedSequence]:
    """The fixed batch: 8 sequences of different lengths; weights make the loss the mean over sequences of token means."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(0, vocab, (n,), generator=generator).tolist()  # noqa: E731
    lengths = torch.randint(3, 20, (8, 2), generator=generator).tolist()
    return [packing.PackedSequence(draw(p), draw(r), {"weight": [1 / (8 * r)] * r}) for p, r in lengths]


def loss(log_probs, batch):
    return -(log_probs * batch.values["weight"]).sum(), {"tokens": torch.tensor(float(len(log_probs)))}


def assemble(shards, tensors):
    """HF name → {(start, shape): piece} on rank 0, from every rank's blocks of ``tensors``."""
    mine = [
        (b.hf_name, b.hf_start, tensor[region(b.local_start, b.shape)].clone())
        for shard, tensor in zip(shards, tensors, strict=True)
        for b in shard.blocks
    ]
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return [piece for rank in everyone for piece in rank]


def run(case):
    par = parallel.initialize(case["tensor"], case["pipeline"], case["sequence"], seed=1, timeout_seconds=120)
    hf = hf_checkpoint.config(case["folder"])
    policy = model.build(hf, par, case["precision"], distributed_optimizer=True)
    hf_checkpoint.load(policy.shards, case["folder"])
    opt, schedule = optimizer.build(policy, SETTINGS, steps=10)
    opt.reload_model_params()
    batch = sequences(hf.vocab_size)
    plan = packing.plan([len(s) for s in batch], par.data, case["micro_batch_tokens"])
    micro = [packing.pack(batch, i, par.tensor, 0, platform.current().device()) for i in plan[par.data_rank]]
    found = {"log_probs": {}, "loss": [], "grad_norm": [], "counts": [len(m) for m in plan]}
    for log_probs, m in zip(steps.log_probs(policy, micro), micro, strict=False):
        for index, values in zip(m.indices, log_probs.split(m.lengths), strict=True):
            found["log_probs"][index] = values
    for step in range(3):
        found["loss"].append(steps.accumulate_gradients(policy, micro, loss)["loss"])
        if step == 0 and par.data == 1:
            parameters = [p for chunk in policy.chunks for p in chunk.module.parameters()]
            found["gradients"] = assemble(policy.shards, [p.main_grad for p in parameters])
        found["grad_norm"].append(optimizer.step(opt, schedule))
    found["weights"] = assemble(policy.shards, [s.tensor for s in policy.shards])
    found["padding_is_zero"] = all(padding_is_zero(s) for s in policy.shards)
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    merged = {**everyone[0], "log_probs": {i: v for r in everyone for i, v in r["log_probs"].items()}}
    merged["padding_is_zero"] = all(r["padding_is_zero"] for r in everyone)
    return merged


def padding_is_zero(shard):
    rest = shard.tensor.clone()
    for block in shard.blocks:
        rest[region(block.local_start, block.shape)] = 0
    return not rest.any().item()


def main():
    cases, out = json.load(open(sys.argv[1])), sys.argv[2]
    rank = int(os.environ["RANK"])
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=300)
    )
    results = {}
    for case in cases:
        size = case["tensor"] * case["pipeline"] * case["data"]
        if rank < size:
            dist.init_process_group(
                "gloo",
                store=dist.PrefixStore(case["name"], store),
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=300),
            )
            results[case["name"]] = run(case)
            dist.barrier()
            parallel.destroy()
        store.add(f"done/{case['name']}", 1)
        while store.add(f"done/{case['name']}", 0) < int(os.environ["WORLD_SIZE"]):
            time.sleep(0.02)
    if rank == 0:
        torch.save(results, out)


if __name__ == "__main__":
    main()
