# SPDX-License-Identifier: Apache-2.0
"""Only the thread that loads is silenced."""

import logging
import sys
import threading
import warnings
from collections.abc import Callable

import pytest

from clp_ros.policies.quiet import quiet


def chatter(who: str) -> None:
    print(f"print {who}")  # noqa: T201
    sys.stdout.writelines([f"lines {who}\n"])
    logging.getLogger("chatty").warning("log %s", who)
    warnings.warn(f"warning {who}", UserWarning, stacklevel=1)


def in_another_thread(work: Callable[[], None]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_this_thread_is_silent_and_others_are_not(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    before = sys.stdout, logging.Logger.handle, list(logging.root.handlers)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with quiet():
            chatter("quiet")
            with quiet():
                chatter("quiet")
            chatter("quiet")
            in_another_thread(lambda: chatter("other"))
            logging.getLogger("chatty").error("an error is told")
        chatter("after")
    printed = capsys.readouterr().out
    assert printed.splitlines() == ["print other", "lines other", "print after", "lines after"]
    assert caplog.messages == ["log other", "an error is told", "log after"]
    assert [str(one.message) for one in warned] == ["warning other", "warning after"]
    assert (sys.stdout, logging.Logger.handle, list(logging.root.handlers)) == before


def test_threads_that_are_quiet_for_different_times(capsys: pytest.CaptureFixture[str]) -> None:
    stdout, entered, leave = sys.stdout, threading.Event(), threading.Event()

    def work() -> None:
        with quiet():
            entered.set()
            leave.wait(10)
            print("quiet to its end")  # noqa: T201

    thread = threading.Thread(target=work)
    with quiet():
        thread.start()
        assert entered.wait(10)
    print("told though the other is quiet")  # noqa: T201
    leave.set()
    thread.join()
    assert sys.stdout is stdout
    assert capsys.readouterr().out == "told though the other is quiet\n"


def test_an_exception_ends_it() -> None:
    stdout = sys.stdout
    with pytest.raises(RuntimeError), quiet():
        raise RuntimeError
    assert sys.stdout is stdout
