"""Hugging Face's Trainer: python train_hf_trainer.py; kill it, and start it again."""

import os
import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import tiered
from tiered.frameworks.huggingface import TieredCallback


class PrintLoss(TrainerCallback):
    """The loss of each step, bit for bit."""

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """Called by the Trainer after each step."""
        if logs and "loss" in logs:
            print(f"step {state.global_step} loss {float(logs['loss']).hex()}", flush=True)


torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, attention_dropout=0.1, use_cache=False,
)  # fmt: skip
tokens = torch.randint(0, 64, (64, 16))
data = [{"input_ids": row, "labels": row} for row in tokens]

tier = TieredCallback(os.environ.get("JOB", "hf-trainer"), tiered.Memory(every_steps=5))
with tempfile.TemporaryDirectory() as folder:
    trainer = Trainer(
        LlamaForCausalLM(config),
        TrainingArguments(
            folder, max_steps=30, per_device_train_batch_size=4, learning_rate=1e-3, warmup_steps=5,
            logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
        ),
        train_dataset=data,
        callbacks=[tier, PrintLoss()],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=tier.resume(trainer))
