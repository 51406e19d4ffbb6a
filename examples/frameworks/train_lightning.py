"""Lightning: python train_lightning.py; kill it, and start it again."""

import os

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch.utils.data import TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

import tiered
from tiered.frameworks.lightning import TieredCallback


class Net(LightningModule):
    """Learns to add up 32 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Dropout(0.1), torch.nn.Linear(64, 1)
        )

    def training_step(self, batch, index: int):
        """One batch's loss, printed bit for bit."""
        (x,) = batch
        loss = (self.layers(x).squeeze(-1) - x.sum(dim=1)).square().mean()
        if self.trainer.is_global_zero:
            print(f"step {self.global_step} loss {loss.item().hex()}", flush=True)
        return loss

    def configure_optimizers(self):
        """AdamW, its rate falling with each step."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=30)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


seed_everything(0)
data = TensorDataset(torch.randn(64, 32))
loader = StatefulDataLoader(data, batch_size=8, shuffle=True)
tier = TieredCallback(os.environ.get("JOB", "lightning"), tiered.Memory(every_steps=5))
trainer = Trainer(
    accelerator="cpu", devices=int(os.environ.get("DEVICES", "1")), max_steps=30, logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    callbacks=[tier],
)  # fmt: skip
trainer.fit(Net(), loader, ckpt_path=tier.resume())
