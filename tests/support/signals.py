"""The name of a signal that not every test run can send."""

import signal

import pytest


# Under nohup the tests ignore SIGHUP, and so do the programs that they start.
IS_IGNORED = hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
HANGUP = pytest.param("SIGHUP", marks=pytest.mark.skipif(IS_IGNORED, reason="nohup makes processes ignore SIGHUP"))
