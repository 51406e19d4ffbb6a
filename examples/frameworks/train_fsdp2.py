"""FSDP2: torchrun --nproc-per-node=2 --max-restarts=3 train_fsdp2.py.

Each rank saves the parts of the model and the optimizer that it has. About restarts with gloo see
train_torchrun.py.
"""

import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import tiered

dist.init_process_group("gloo")
rank = dist.get_rank()
mesh = init_device_mesh("cpu", (dist.get_world_size(),))
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(32, 67), torch.nn.ReLU(), torch.nn.Linear(67, 1))
for layer in model:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
torch.manual_seed(1 + rank)

state = {"model": model, "optimizer": optimizer, "rng": tiered.RngState()}
with tiered.Checkpointer(os.environ.get("JOB", "fsdp2"), tiered.Memory(every_steps=5)) as ckpt:
    start = ckpt.restore(state)
    for step in range(start, 30):
        x = torch.randn(16, 32)
        loss = (model(x).squeeze(-1) - x.sum(dim=1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if rank == 0:
            print(f"step {step} loss {loss.item().hex()}", flush=True)
        ckpt.save(step, state)
dist.destroy_process_group()
