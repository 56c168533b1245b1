"""The text of a model card: the part that is written by `training/model_card.py`, and the user's part."""

from pathlib import Path

from binaryvit_runtime.errors import UserError, first_sentence


NOTES = "<!-- Text below this line stays when the card is written again. -->"
TAG = "binaryvit_hf"  # in the metadata of every card that we write


def read_card(path: Path) -> str:
    """
    The text of a card; empty if there is none. Bytes that are not UTF-8 are surrogates (`surrogateescape`).

    Raises:
        UserError: the card cannot be read.
    """
    try:
        content = path.read_bytes() if path.is_file() else b""
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read: {first_sentence(error)}") from error
    return content.decode(errors="surrogateescape").replace("\r\n", "\n")


def split_card(card: str) -> tuple[str, str]:
    """
    The part that we wrote, and the user's text: what is below the line `NOTES`, or all of a card that is not ours. A card
    of a config or of an earlier version has no such line.
    """
    ours, line, notes = card.partition(NOTES)
    metadata = card.removeprefix("---\n").partition("\n---\n")[0]
    return (ours, notes.strip()) if line or f"- {TAG}" in metadata.splitlines() else ("", card.strip())
