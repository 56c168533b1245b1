"""
Benchmarks of forwards (`inference`), from files to labels (`pipeline`), of whole processes (`cold_start`), of training
steps (`training`) and of the image loader (`loader`).

Times of different runs and machines do not compare, so each benchmark also measures peers in the same run, and prints
ratios to them. Competitors run in turns, each in a process of its own with its own threads (`interleaved`). The loaders take
turns in one process. `trained` times models of an ablation in the same way.

Input: a row of `configs/`, and numbers of steps, threads and images. Weights and images are random.
Output: a dictionary of medians and deciles. Each module also formats it as text, and `inference` draws it as a plot.

`binaryvit benchmark` is the command. These files must not import `training` or `cli`.
"""
