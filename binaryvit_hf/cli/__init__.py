"""
The command `binaryvit`: packs, converts, runs, inspects, measures and uploads models, and starts ablations.

Each command is a module of its name with

- `EXAMPLE`, a command line that works as it stands, or several, one a line,
- `add_arguments(parser)`,
- `run(options)`, whose docstring is the help text, its first sentence that in the list of commands. It returns an exit code, or nothing for 0,
- `NEEDS_PYTORCH = False` if `run` imports PyTorch only for some inputs,
- `WITHOUT_PYTORCH`, the command line that works without PyTorch, if it is not the name alone.

`main` parses, calls `run` and turns exceptions into exit codes and one line on stderr:

| exit code | meaning |
| --- | --- |
| 0 | done |
| 1 | something failed, such as an upload, a run of an ablation, or some of the images |
| 2 | wrong input (`UserError`, or a wrong argument) |
| 130 | interrupted by Ctrl-C |
| 141 | the reader of stdout has closed it |

Commands import PyTorch and transformers only inside of `run`: `--help` and wrong arguments do not wait for them.
Only `run` imports `models.py` and `classification.py`, so these may import anything. The folder is installed as the package
`binaryvit_cli`, so that it does not import `binaryvit_hf`. No other part of the package imports it.
"""

import argparse
import codecs
import importlib
import io
import os
import signal
import sys

from binaryvit_runtime.errors import RunError, UploadError, UserError
from binaryvit_runtime.writing import describe_full_disk, discard_output

from .common import prepare_libraries, print_error
from .parser import CommandParser, create_parser


GROUPS = {
    "use a trained model": ("classify", "demo", "page", "export", "push"),
    "prepare a model": ("pack", "convert", "card"),
    "measure and compare": ("inspect", "ops", "benchmark", "compare", "ablation"),
    "this machine": ("doctor",),
}
COMMANDS = tuple(name for names in GROUPS.values() for name in names)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; `arguments` are those after `binaryvit`. Returns the exit code."""
    replace_closed_streams()
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        parser = create_command_parser()
        if not arguments:
            parser.print_help(sys.stderr)
            return 2
        options = parser.parse_args(arguments)
        if isinstance(sys.stdout, io.TextIOWrapper):  # file names may be any bytes
            utf8 = codecs.lookup(sys.stdout.encoding).name == "utf-8"
            sys.stdout.reconfigure(errors="surrogateescape" if utf8 else "backslashreplace")
        if options.needs_pytorch:
            prepare_libraries(options.program)
        code = options.run(options) or 0
        sys.stdout.flush()
    except BrokenPipeError:  # for example `| head`
        discard_output(sys.stdout)
        return 128 + 13  # the exit code that a shell reports for SIGPIPE
    except (UserError, RunError, UploadError) as error:
        print_error(str(error))
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print_error("Interrupted.")
        return 128 + signal.SIGINT
    except Exception as error:
        if (failure := describe_full_disk(error)) is None:
            raise
        print_error(f"Nothing more can be written: {failure}.")
        return 1
    return code


def replace_closed_streams() -> None:
    """Send output to nowhere where the parent process has closed stdout or stderr (`>&-`): Python has `None` there."""
    # `print(file=None)` would print errors on stdout.
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115


class PrintVersion(argparse.Action):
    def __call__(self, parser, *_):
        # Imported only here: it takes as long as the rest of `binaryvit --help`.
        from binaryvit_runtime.resources import package_version

        print(parser.prog, package_version(), flush=True)  # `main` reports a stdout that cannot be written
        parser.exit()


def create_command_parser() -> CommandParser:
    groups = {
        title: {name: importlib.import_module(f".{name}", __package__) for name in names}
        for title, names in GROUPS.items()
    }
    parser = create_parser(groups)
    parser.add_argument("--version", action=PrintVersion, nargs=0, help="print the version of binaryvit_hf and exit")
    return parser
