"""Serves a folder of files to the browsers of this machine."""

import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from ..errors import UserError


HOST = "127.0.0.1"


class PageHandler(SimpleHTTPRequestHandler):
    # The system's own table of types has other types for these on some machines, which browsers refuse.
    extensions_map = {
        **SimpleHTTPRequestHandler.extensions_map,
        ".js": "text/javascript",
        ".wasm": "application/wasm",
        ".html": "text/html; charset=utf-8",
        ".css": "text/css; charset=utf-8",
    }

    def end_headers(self) -> None:
        self.send_header("Cache-Control", "no-cache")  # another model may be served at the same address tomorrow
        self.send_header("X-Content-Type-Options", "nosniff")
        super().end_headers()

    def send_head(self):
        try:
            return super().send_head()
        except ValueError:  # a null byte in the path
            self.send_error(404)
            return None

    def list_directory(self, path):
        self.send_error(404)

    def log_message(self, *_) -> None:
        """Nothing: requests are no news."""


class PageServer(ThreadingHTTPServer):
    def handle_error(self, *address) -> None:
        """Report errors, except of a browser that closed the connection: it does when a tab is closed or loaded again."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(*address)


def create_server(folder: Path, port: int) -> ThreadingHTTPServer:
    """
    A server of a folder for this machine only. `serve_forever` serves.

    Args:
        port: 0 takes any free port.

    Raises:
        UserError: the port is taken, or not allowed.
    """
    try:
        return PageServer((HOST, port), partial(PageHandler, directory=str(folder)))
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"Port {port} cannot be used ({reason}): choose another with --port.") from error
