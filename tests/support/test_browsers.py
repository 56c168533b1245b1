"""Servers and browsers of the tests end with the test that started them."""

import threading

import pytest
from browsers import served


def test_a_server_ends_when_its_test_is_skipped(tmp_path):
    before = threading.enumerate()
    with pytest.raises(pytest.skip.Exception), served(tmp_path):
        pytest.skip("no browser")
    assert threading.enumerate() == before
