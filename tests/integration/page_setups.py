"""What a block of README.md or docs/ takes for granted, so that it can run: code around it.

A block that is not named here stands for itself. `{block}` is where it goes.
"""

HUGGING_FACE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from tiered.frameworks.huggingface import TieredCallback

config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=4, use_cache=False,
)
model = LlamaForCausalLM(config)
data = [{{"input_ids": row, "labels": row}} for row in torch.randint(0, 64, (32, 16))]
args = TrainingArguments(
    "trainer", max_steps=20, per_device_train_batch_size=4, save_strategy="no",
    report_to="none", disable_tqdm=True, use_cpu=True,
)
{block}
assert tiered.recover("my-job").step == 20
"""

LIGHTNING = """
import torch
from functools import partial
from lightning.pytorch import LightningModule, Trainer
from torchdata.stateful_dataloader import StatefulDataLoader
from tiered.frameworks.lightning import TieredCallback

class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(8, 1)

    def training_step(self, batch, index):
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())

model, loader = Net(), StatefulDataLoader(torch.randn(64, 8), batch_size=4)
Trainer = partial(
    Trainer, accelerator="cpu", logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False,
)
{block}
assert tiered.recover("my-net").step == 30
"""

RAY_TRAIN = """
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

state = {{"model": torch.nn.Linear(4, 4)}}
{block}
result = TorchTrainer(
    train_func, scaling_config=ScalingConfig(num_workers=2), run_config=run_config
).fit()
assert result.error is None
"""

GET_CHECKPOINT = """
def resumed():
    import safetensors.torch
    {block}
    assert "model/weight" in shard or any("weight" in key for key in shard), list(shard)

result = TorchTrainer(
    resumed, scaling_config=ScalingConfig(num_workers=2), run_config=RunConfig(
        name="llama-70b", storage_path="s3://bucket/runs", callbacks=[tiered.ray_train.Callback()]
    ),
).fit()
assert result.error is None
"""

# By page, and by a phrase of the block.
SETUPS = {
    ("README.md", "def train_func"): RAY_TRAIN,
    ("README.md", "# Hugging Face"): HUGGING_FACE,
    ("README.md", "# Lightning"): LIGHTNING,
    ("docs/RAY_TRAIN.md", "get_checkpoint()"): GET_CHECKPOINT,
}
