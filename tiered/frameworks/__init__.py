"""Callbacks for training frameworks; each module needs its framework, and only that one.

`tiered.frameworks.huggingface` is for transformers' `Trainer` (`pip install tiered[huggingface]`),
`tiered.frameworks.lightning` for Lightning's (`pip install tiered[lightning]`).
"""
