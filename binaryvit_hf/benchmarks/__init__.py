"""
Benchmarks of forwards (`inference`), of training steps (`training`) and of the image loader (`loader`).

All of them compare with peers in the same run and print ratios to them, because times of different runs and machines do not
compare. Competitors run in turns, each in a process of its own with its own caches and threads (`interleaved`).

Enters: a row of `configs/` and numbers of steps, threads and images. Nothing is downloaded; weights and images are random.
Leaves: medians and deciles in a dictionary, which each module formats as text and `inference` as a plot.
`binaryvit benchmark` is the command. This room must not know `training` or `cli`.
"""
