"""
Callbacks of `DistillationTrainer`, one file each.

Optional methods, which `--NAME` arguments of `optional_methods.py` switch on: `averaging.py`, `oscillation.py`,
`sign_gradient.py`, and `batch_norm_reestimation.py`, which the trainer calls directly. Always on: `positive_clips.py` and
`termination.py`. `checkpointed.py` is the base class of callbacks whose tensors belong in every checkpoint.
"""
