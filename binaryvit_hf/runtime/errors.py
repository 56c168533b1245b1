"""Errors that commands report in one sentence, and helpers for messages: numbers with nouns, messages of other libraries."""

import sys
from collections.abc import Iterable


class UserError(ValueError):
    """Wrong input. The message says what is wrong and what to do. Commands print only it and exit with code 2."""


class LoadingError(UserError):
    """A config, model or image processor is missing, damaged or unfit. The message says why; callers add the name."""


class NoModelError(LoadingError):
    """There is no model of this name, or the Hub does not give it. The message also says what to do."""


class UnsupportedModelError(UserError):
    """A model that the runtime does not compute, and PyTorch may. The message says why; callers add the name."""


class NonFiniteLossError(RuntimeError):
    """The loss of training is not finite. Commands print only the message and exit with code 1."""


class TerminatedError(RuntimeError):
    """The run received SIGTERM or SIGHUP. Commands print only the message and exit with code 143."""


class RunError(RuntimeError):
    """A training run that a command started has failed. Commands print only the message and exit with code 1."""


class UploadError(RuntimeError):
    """An upload to the Hub has failed. Commands print only the message and exit with code 1."""


SUGGESTIONS = 3  # at most, of equally good ones
FOREIGN_LENGTH = 300  # most characters of another library's message
LINE_LENGTH = 1500  # most characters of our message, including the values and the foreign message that it quotes


def first_sentence(error: BaseException) -> str:
    """
    The first line of another library's message: printable, at most `FOREIGN_LENGTH` characters.

    An error without a message gives the name of its class.
    """
    hub_errors = sys.modules.get("huggingface_hub.errors")  # imported if an error is of its class
    if hub_errors and isinstance(error, hub_errors.StrictDataclassError) and error.__cause__ is not None:
        error = error.__cause__  # the message of the config's own check
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if not line or isinstance(error, KeyError):  # the message of a KeyError is only the key
        line = f"{type(error).__name__} {line}".strip()
    return one_line(line, FOREIGN_LENGTH)


def close_names(name: object, known: Iterable[object]) -> list[str]:
    """
    The known names that a user may have meant: those that end with `name` as a word, such as `num_train_epochs` for
    `epochs`, or else the one of the closest spelling, whatever its case.
    """
    import difflib  # only misspelt names need it

    wanted, names = str(name), list(dict.fromkeys(map(str, known)))
    ends = tuple(f"{sign}{wanted}" for sign in "_-/")
    if len(wanted) > 2 and (longer := [other for other in names if other.endswith(ends)]):
        return longer[:SUGGESTIONS]
    spellings = {other.casefold(): other for other in reversed(names)}
    return [spellings[close] for close in difflib.get_close_matches(wanted.casefold(), spellings, n=1)]


def did_you_mean(name: object, known: Iterable[object], otherwise: str = ".") -> str:
    """The end of a sentence about an unknown name: `; did you mean 'digits'?`, or `otherwise` if no known name is close."""
    return suggest(close_names(name, known), otherwise)


def suggest(close: list[str], otherwise: str = ".") -> str:
    """The end of a sentence that names what a user may have meant: `; did you mean 'a' or 'b'?`, or `otherwise`."""
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else otherwise


def counted(number: int, noun: str) -> str:
    """`1 image`, `2 images`, `2 classes`."""
    plural = f"{noun}es" if noun.endswith(("s", "x", "ch")) else f"{noun}s"
    return f"{number} {noun if number == 1 else plural}"


def one_line(text: str, length: int = LINE_LENGTH) -> str:
    """A text as one line for a terminal: control characters are escaped, and the middle of a long text is left out."""
    return shorten("".join(map(escape, shorten(text, length))), length)


def shorten(text: str, length: int) -> str:
    half = (length - 3) // 2
    return text if len(text) <= length else f"{text[:half]} … {text[-half:]}"


def escape(character: str) -> str:
    if character.isprintable():
        return character
    return " " if character.isspace() else repr(character)[1:-1]
