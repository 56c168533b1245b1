"""
Training: from a command line to a packed model with its card.

Enters: arguments and configuration files. Leaves: an output directory with the packed model, the latent weights, metrics,
learning curves, a model card and every argument.

`run.py` holds the steps of a run in order. `trainer.py` changes the loss of transformers' `Trainer` and what it saves.
`callbacks/` holds optional methods, each an argument that is off by default.

This room imports the network and the data, never the command line tool or the benchmarks.
"""
