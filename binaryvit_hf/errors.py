"""What goes wrong by the user's hand or data, told in one sentence."""

from huggingface_hub.errors import StrictDataclassError


class UserError(ValueError):
    """Bad input: the message says what is wrong and what to do. A command prints it alone and exits with code 2."""


class LoadingError(UserError):
    """What is to be loaded is not there, damaged or unfit; the message says why in one sentence, but not of which model."""


class NonFiniteLossError(RuntimeError):
    """Training met a loss that is no number. A command prints the message alone and exits with code 1."""


class TerminatedError(RuntimeError):
    """The run was told to end. A command prints the message alone and exits with the code of a SIGTERM, 143."""


class RunError(RuntimeError):
    """A training run that a command started failed. The command prints the message alone and exits with code 1."""


class UploadError(RuntimeError):
    """The Hub did not take an upload. A command prints the message alone and exits with code 1."""


FOREIGN_LENGTH = 300  # characters of a message that another library wrote
LINE_LENGTH = 1500  # characters of a message of ours, with the values and the foreign message that it quotes


def first_sentence(error: BaseException) -> str:
    """
    The first line of another library's message, printable and at most `FOREIGN_LENGTH` characters long. The kind of the
    error, if it has no message.
    """
    if isinstance(error, StrictDataclassError) and error.__cause__ is not None:
        error = error.__cause__  # what the config's own check said
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if not line or isinstance(error, KeyError):  # whose message is the key alone
        line = f"{type(error).__name__} {line}".strip()
    return one_line(line, FOREIGN_LENGTH)


def one_line(text: str, length: int = LINE_LENGTH) -> str:
    """A text as one line of a terminal: control characters are escaped, and the middle is left out if it is too long."""
    return shorten("".join(map(escape, shorten(text, length))), length)


def shorten(text: str, length: int) -> str:
    half = (length - 3) // 2
    return text if len(text) <= length else f"{text[:half]} … {text[-half:]}"


def escape(character: str) -> str:
    if character.isprintable():
        return character
    return " " if character.isspace() else repr(character)[1:-1]
