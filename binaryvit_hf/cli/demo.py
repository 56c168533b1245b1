"""`binaryvit demo`: classifies pictures in this machine's browser."""

import argparse
import contextlib
import tempfile
from pathlib import Path

from binaryvit_runtime.errors import UserError
from binaryvit_runtime.writing import sigterm_as_exit

from .common import add_token_argument


NEEDS_PYTORCH = False
EXAMPLE = "binaryvit demo binaryvit-digits"
MOST_PORT = 2**16 - 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="packed model: folder, Hub id or name of a shipped model")
    parser.add_argument(
        "--port", metavar="N", type=int, default=8000, help="port of this machine, 0 for any (default: 8000)"
    )
    parser.add_argument(
        "--no-browser", action="store_true", help="print the address and open no browser (default: open it)"
    )
    add_token_argument(parser)


def run(options: argparse.Namespace) -> None:
    """
    Open a page in this machine's browser that classifies pictures.

    It is the page of `binaryvit page`. Only this machine can reach it, and Ctrl-C ends it.
    """
    import threading
    import webbrowser

    from binaryvit_runtime.browser.page import write_page
    from binaryvit_runtime.browser.server import create_server

    if not 0 <= options.port <= MOST_PORT:
        raise UserError(f"--port must be from 0 to {MOST_PORT}, not {options.port}.")
    with sigterm_as_exit(), tempfile.TemporaryDirectory() as temporary:
        page = Path(temporary) / "page"
        with create_server(page, options.port) as server:  # before the model is read: the port may be taken
            write_page(options.model, page, token=options.token)
            address = f"http://127.0.0.1:{server.server_port}"
            print(f"{options.model} is at {address}; Ctrl-C ends it.", flush=True)
            if not options.no_browser:
                # The call waits for the end of some browsers, those of a terminal, which wait for the server.
                threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
            with contextlib.suppress(KeyboardInterrupt):
                server.serve_forever()
