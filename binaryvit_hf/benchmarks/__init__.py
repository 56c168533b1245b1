"""
Benchmarks that print ratios to peers of the same run: forwards, training steps, the image loader.

Enters: rows of `configs/` and the number of steps. Leaves: medians with deciles, as text, JSON or a plot. Contestants run in
turns in processes of their own, so no one profits from another's caches or threads.
"""
