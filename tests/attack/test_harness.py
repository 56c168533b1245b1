"""The sweeps detect every bad ending."""

import os
import time
from random import Random

import harness
import pytest
from harness import Said, Wrong, count, format_table, judge, sweep


def raise_wrong():
    raise Wrong("off by 1")


CASES = [
    (lambda: "answered", "answered"),
    (lambda: "refused", "refused"),
    (raise_wrong, "wrong"),
    (lambda: {}["key"], "thrown"),
    (lambda: os._exit(0), "thrown"),
    (lambda: sum(number for number in range(3 * 10**7)), "too slow"),
    (lambda: b"1" * (600 * 2**20), "too big"),
    (lambda: None, "thrown"),
    (lambda: "answered", "answered"),
]


def test_every_ending_is_told_from_the_others_and_the_cases_after_it_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "HANGS", 20.0)
    monkeypatch.setattr(harness, "SECONDS", 0.5)
    monkeypatch.setattr(harness, "BYTES", 300 * 2**20)

    def attack(rng, folder):
        (folder / "own").touch(exist_ok=False)
        number = next(number for number in range(len(CASES)) if Random(number).getstate() == rng.getstate())
        return CASES[number][0]()

    ended = sweep(attack, range(len(CASES)), tmp_path)
    assert [(one.seed, one.ending) for one in ended] == [(seed, ending) for seed, (_, ending) in enumerate(CASES)]
    assert "KeyError: 'key' (test_harness.py:" in ended[3].detail
    assert format_table({"all": count(ended)})[1].split() == ["all", "9", "1", "2", "3", "1", "1", "1"]


def test_a_case_that_hangs_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "HANGS", 0.5)
    (ended,) = sweep(lambda rng, folder: time.sleep(60), [7], tmp_path)
    assert (ended.seed, ended.ending) == (7, "too slow")


def test_a_command_is_judged_by_its_exit_code_and_one_sentence():
    assert judge(Said(0, "", "a warning")) == "answered"
    assert judge(Said(2, "", "\nerror: no.\n")) == "refused"
    for said in (
        Said(2, "", ""),
        Said(1, "", "error: a\nerror: b"),
        Said(3, "", "error: a"),
        Said(2, "", "error: " * 10**4),
    ):
        with pytest.raises(AssertionError):
            judge(said)
