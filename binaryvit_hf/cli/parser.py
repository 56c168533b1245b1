"""The parser of `binaryvit`: help for readers who are new, and one sentence about a wrong argument."""

import argparse
import inspect
import shutil
import textwrap
from types import ModuleType

from binaryvit_runtime.errors import UserError, did_you_mean


MIN_WIDTH, MAX_WIDTH = 24, 100  # of help, in characters
TRAINING = "Training is a program of its own: `python -m binaryvit_hf.training --help`."


class CommandParser(argparse.ArgumentParser):
    """
    Raises UserError for a wrong argument, with a suggestion for a misspelt one. Unknown arguments are errors of the command
    that gets them.
    """

    def __init__(self, **options):
        super().__init__(formatter_class=HelpFormatter, **options)

    def parse_known_args(self, args=None, namespace=None):
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            known = [option for action in self._actions for option in action.option_strings]
            several = any(action.nargs in ("+", "*") for action in self._actions if not action.option_strings)
            options_given = any(word.startswith("-") for word in args or ())
            is_apart = several and options_given and not unknown[0].startswith("-")
            together = ": names stand together, before or after the options" if is_apart else ""
            suggestion = together or did_you_mean(unknown[0], known, otherwise="")
            self.error(f"there is no argument {unknown[0]!r}{suggestion}")
        return namespace, unknown

    def _check_value(self, action, value):
        if action.choices is None or value in action.choices:
            return
        suggestion = did_you_mean(str(value), action.choices, otherwise="")
        if action.nargs == argparse.PARSER:
            hint = f" {TRAINING}" if value == "train" else ""
            self.error(f"there is no command {value!r}{suggestion}", hint)
        raise argparse.ArgumentError(action, f"{value!r} is none of {', '.join(map(str, action.choices))}{suggestion}")

    def error(self, message: str, hint: str = ""):
        end = "" if message.endswith("?") else "."
        raise UserError(f"{message[0].upper()}{message[1:]}{end}{hint} See `{self.prog} --help`.")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=26, width=help_width())

    def _split_lines(self, text, width):
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)  # names of networks have hyphens


def help_width() -> int:
    return min(max(shutil.get_terminal_size().columns - 2, MIN_WIDTH), MAX_WIDTH)


def create_parser(groups: dict[str, dict[str, ModuleType]]) -> CommandParser:
    """
    The parser of all commands.

    Args:
        groups: the modules of the commands by name, by the title of their group in the help.
    """
    width = max(len(name) for modules in groups.values() for name in modules)
    listed = ""
    for title, modules in groups.items():
        listed += f"\n\n{title}:"
        for name, module in modules.items():
            indent = " " * (width + 4)
            listed += "\n" + textwrap.fill(
                first_sentence_of(module), help_width(), initial_indent=f"  {name:{width}}  ", subsequent_indent=indent
            )
    parser = CommandParser(
        prog="binaryvit",
        usage="binaryvit COMMAND ...",
        description=f"1-bit vision transformers: use, ship and measure them.{listed}",
        epilog=f"`binaryvit COMMAND --help` explains a command with an example.\n{TRAINING}",
    )
    commands = parser.add_subparsers(
        required=True, metavar="COMMAND", prog=parser.prog, parser_class=CommandParser, help=argparse.SUPPRESS
    )
    for modules in groups.values():
        for name, module in modules.items():
            examples = module.EXAMPLE.splitlines()
            command = commands.add_parser(
                name,
                description=textwrap.fill(" ".join(inspect.cleandoc(module.run.__doc__).split()), help_width()),
                epilog="\n  ".join([f"example{'s' * (len(examples) > 1)}:", *map(str.strip, examples)]),
            )
            module.add_arguments(command)
            needs_pytorch = getattr(module, "NEEDS_PYTORCH", True)
            command.set_defaults(run=module.run, program=command.prog, needs_pytorch=needs_pytorch)
    return parser


def first_sentence_of(module: ModuleType) -> str:
    """What the command does, in the list of commands."""
    return " ".join(inspect.cleandoc(module.run.__doc__).split()).split(". ")[0].rstrip(".") + "."
