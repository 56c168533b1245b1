"""Reads pictures with the pixels that training and `binaryvit classify` see, for other pipelines."""

from binaryvit_runtime.pixels import open_picture, to_rgb


__all__ = ["open_picture", "to_rgb"]
