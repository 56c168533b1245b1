"""`binaryvit page`: writes a web page that classifies pictures in the browser."""

import argparse
import shlex
from pathlib import Path

from .common import add_token_argument


NEEDS_PYTORCH = False
EXAMPLE = "binaryvit page binaryvit-digits digits.html --single-file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="packed model: folder, Hub id or name of a shipped model")
    parser.add_argument(
        "out",
        metavar="OUT",
        type=output_path,
        help="folder to write (with --single-file a file), new or empty, or an earlier page, which is replaced",
    )
    parser.add_argument(
        "--single-file",
        action="store_true",
        help="write one HTML file, which also opens from the disk (default: a folder, which needs a web server)",
    )
    add_token_argument(parser)


def output_path(text: str) -> Path:
    if not text:  # such as a variable that is not set; `Path` would make the working folder of it
        raise argparse.ArgumentTypeError("its name is empty")
    return Path(text)


def run(options: argparse.Namespace) -> None:
    """
    Write a web page that classifies pictures in its visitor's browser.

    It needs no server that computes, works without a connection and sends nothing.
    """
    from binaryvit_runtime.browser.page import write_page
    from binaryvit_runtime.writing import is_stream

    write_page(options.model, options.out, options.single_file, options.token)
    if options.single_file:
        if not is_stream(options.out):
            print(f"{options.out}: open it in a browser.")
    else:
        folder = shlex.quote(str(options.out))
        print(f"{options.out}: put it on any web server, such as `python -m http.server --directory {folder}`.")
