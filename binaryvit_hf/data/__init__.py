"""
Images and labels for training and evaluation.

Enters: image folders, datasets of the Hub or the disk, streams, and the arguments that choose them. Leaves: `pixel_values` and
`labels`, decoded and transformed as they are read, and messages about images that cannot be used.

This room knows the network's input (size, mean, deviation), but neither its weights nor the training loop.
"""
