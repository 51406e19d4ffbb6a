"""Plain PyTorch, data parallel: torchrun --nproc-per-node=2 --max-restarts=3 train_torchrun.py.

Kill a worker: torchrun starts all of them again, and they go on from memory. Set
TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for that with gloo: the store that torch 2.13 shares between
the lives of the workers keeps the addresses of the dead ones.
"""

import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import tiered

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
net = torch.nn.Sequential(
    torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Dropout(0.1), torch.nn.Linear(64, 1)
)
model = DistributedDataParallel(net)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=30)
torch.manual_seed(1 + rank)  # other data and dropout on each rank

state = {"model": net, "optimizer": optimizer, "scheduler": scheduler, "rng": tiered.RngState()}
with tiered.Checkpointer(os.environ.get("JOB", "torchrun"), tiered.Memory(every_steps=5)) as ckpt:
    start = ckpt.restore(state)
    for step in range(start, 30):
        x = torch.randn(16, 32)
        loss = (model(x).squeeze(-1) - x.sum(dim=1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if rank == 0:
            print(f"step {step} loss {loss.item().hex()}", flush=True)
        ckpt.save(step, state)
dist.destroy_process_group()
