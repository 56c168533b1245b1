"""Helpers for messages."""

import ast
import re
from pathlib import Path

import pytest

import binaryvit_hf
from binaryvit_runtime.errors import counted


@pytest.mark.parametrize(
    "number, noun, text",
    [
        (0, "image", "0 images"),
        (1, "image", "1 image"),
        (2, "broken image", "2 broken images"),
        (1, "class", "1 class"),
        (3, "class", "3 classes"),
        (2, "batch", "2 batches"),
        (2, "process", "2 processes"),
    ],
)
def test_a_noun_agrees_with_its_number(number, noun, text):
    assert counted(number, noun) == text


def test_no_message_has_a_plural_in_brackets():
    for file in Path(binaryvit_hf.__file__).parent.rglob("*.py"):
        strings = [node.value for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Constant)]
        found = [text for text in strings if isinstance(text, str) and re.search(r"[a-z]\(e?s\)", text)]
        assert found == [], file
