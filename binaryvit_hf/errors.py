"""What goes wrong by the user's hand or data, told in one sentence."""


class UserError(ValueError):
    """Bad input: the message says what is wrong and what to do. A command prints it alone and exits with code 2."""


class NonFiniteLossError(RuntimeError):
    """Training met a loss that is no number. A command prints the message alone and exits with code 1."""


class TerminatedError(RuntimeError):
    """The run was told to end. A command prints the message alone and exits with the code of a SIGTERM, 143."""


class RunError(RuntimeError):
    """A training run that a command started failed. The command prints the message alone and exits with code 1."""


class UploadError(RuntimeError):
    """The Hub did not take an upload. A command prints the message alone and exits with code 1."""


def first_sentence(error: Exception) -> str:
    """The first line of an error's message, or its kind if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
