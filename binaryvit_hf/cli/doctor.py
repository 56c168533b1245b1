"""`binaryvit doctor`: describes this machine, for bug reports."""

import argparse


EXAMPLE = "binaryvit doctor"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`doctor` takes no arguments."""


def run(options: argparse.Namespace) -> None:
    """Print versions, the features of this CPU, and the kernels that run packed models on it."""
    from binaryvit_hf.doctor import describe_machine

    print(describe_machine())
