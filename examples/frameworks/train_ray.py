"""Ray Train: python train_ray.py; kill a worker or a host, and it goes on from memory."""

import os
import tempfile

import ray.train
import ray.train.torch
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

import tiered


def train_func() -> None:
    """What each worker runs, again after each failure."""
    rank = ray.train.get_context().get_world_rank()
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Dropout(0.1), torch.nn.Linear(64, 1)
    )
    model = ray.train.torch.prepare_model(net)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(1 + rank)  # other data and dropout on each rank

    state = {"model": model, "optimizer": optimizer, "rng": tiered.RngState()}
    with tiered.Checkpointer(memory=tiered.Memory(every_steps=5)) as ckpt:  # of the run's name
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


result = TorchTrainer(
    train_func,
    scaling_config=ScalingConfig(num_workers=2),
    run_config=RunConfig(
        name=os.environ.get("JOB", "ray-train"),
        storage_path=os.environ.get("STORAGE", tempfile.gettempdir()),
        failure_config=FailureConfig(max_failures=3),
        callbacks=[tiered.ray_train.Callback()],
    ),
).fit()
print(tiered.ray_train.read_summary(result))
