"""`binaryvit ops`: counts the operations and bytes of a network."""

import argparse
import json
from dataclasses import asdict

from binaryvit_runtime.errors import LoadingError, UserError
from binaryvit_runtime.progress import Progress
from binaryvit_runtime.resources import shipped_configs, shipped_models

from .common import add_token_argument


EXAMPLE = "binaryvit ops binaryvit-small-patch4-224"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="row of configs/, folder, Hub id or name of a shipped model; only its config is read",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    add_token_argument(parser)


def run(options: argparse.Namespace) -> None:
    """
    Count the operations and bytes of a network, by kind of layer and in all.

    BOPs are 1-bit operations, FLOPs are those in floats, and OPs = FLOPs + BOPs/64, for one image.
    """
    from binaryvit_hf.ops import count_operations, format_table, total

    from .models import find_model

    _, config = find_model(options.model, options.token, shipped_configs() | shipped_models())
    try:
        with Progress("Counting"):
            costs = count_operations(config)
    except LoadingError as error:
        raise UserError(f"The operations of {options.model!r} cannot be counted: {error}") from error
    if options.json:
        described = [asdict(cost) | {"ops": cost.ops} for cost in (*costs, total(costs))]
        print(json.dumps({"layers": described[:-1], "total": described[-1]}, indent=2))
    else:
        print(format_table(costs))
