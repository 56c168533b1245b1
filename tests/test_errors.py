"""Helpers for messages."""

import ast
import re
from pathlib import Path

import pytest

import binaryvit_hf
from binaryvit_runtime.errors import counted, did_you_mean


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


@pytest.mark.parametrize(
    "name, end",
    [
        ("do_trian", "; did you mean 'do_train'?"),
        ("DO-TRAIN", "; did you mean 'do_train'?"),
        ("epochs", "; did you mean 'num_train_epochs'?"),
        ("batch_size", "; did you mean 'train_batch_size' or 'eval_batch_size'?"),
        ("lr", "."),
        ("colour", "."),
        ("", "."),
    ],
)
def test_a_misspelt_or_shortened_name_gets_a_suggestion_and_other_names_get_none(name, end):
    known = ["do_train", "num_train_epochs", "train_batch_size", "eval_batch_size", "weight_lr"]
    assert did_you_mean(name, known) == end
    assert did_you_mean(name, []) == "."
