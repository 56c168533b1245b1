"""What goes wrong by the user's hand or data, told in one sentence."""


class UserError(ValueError):
    """Bad input: the message says what is wrong and what to do. A command prints it alone and exits with code 2."""


class NonFiniteLossError(RuntimeError):
    """Training met a loss that is no number. A command prints the message alone and exits with code 1."""
