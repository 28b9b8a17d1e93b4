"""Ctrl-C at any moment: one ends the run in order, two at once, more change nothing."""

import signal

import pytest

from vistok.core.interrupts import deferred
from vistok.training.stopping import INTERRUPT, StopAfterStep


def test_a_third_interrupt_changes_nothing():
    stop = StopAfterStep()
    before = signal.getsignal(signal.SIGINT)
    with stop.listening(signal.SIGINT):
        signal.raise_signal(signal.SIGINT)
        assert stop.asked == INTERRUPT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        for _ in range(3):  # while the last checkpoint is being closed
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_an_import_is_not_interrupted():
    before, done = signal.getsignal(signal.SIGINT), []
    with pytest.raises(KeyboardInterrupt), deferred():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        done.append("imported")
    assert done == ["imported"] and signal.getsignal(signal.SIGINT) is before
    with deferred():
        pass
