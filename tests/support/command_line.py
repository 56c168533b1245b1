"""Calls `binaryvit` and the training script in this process."""

from binaryvit_cli import main
from binaryvit_hf.training import run as script


def run(capsys, *arguments) -> str:
    assert main([str(argument) for argument in arguments]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def assert_refused(capsys, arguments, *words: str, code: int = 2) -> None:
    """The command fails with this exit code and one sentence that contains `words`."""
    assert main([str(argument) for argument in arguments]) == code
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert len(message.splitlines()) == 1
    for word in words:
        assert word in message


def refusal(capsys, *arguments) -> str:
    assert script.main([str(argument) for argument in arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]
