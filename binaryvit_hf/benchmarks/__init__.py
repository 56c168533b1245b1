"""
Benchmarks of forwards (`inference`), of training steps (`training`) and of the image loader (`loader`).

Times of different runs and machines do not compare, so each benchmark also measures peers in the same run, and prints
ratios to them. Competitors run in turns, each in a process of its own with its own threads (`interleaved`).

Enters: a row of `configs/`, and numbers of steps, threads and images. Weights and images are random.
Leaves: a dictionary of medians and deciles, which each module also formats as text, and `inference` as a plot.
`binaryvit benchmark` is the command. This room must not know `training` or `cli`.
"""
