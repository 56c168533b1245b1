"""
Methods that act during training, one file each: weight averaging, oscillation freezing, sign gradients that sharpen,
re-estimation of batch norm statistics, positive attention clips.

Each is a `TrainerCallback` that `DistillationTrainer` adds when its argument is given.
"""
