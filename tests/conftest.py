"""What holds for all tests: in CI (CI_NO_SKIP=1) a skipped test is a failure, unless it needs a GPU.

A test that skips because a program is missing (chromium, gcc) says which; .ci/run installs them all, so that in CI a
skip means that something was not tested. Reasons that begin with "needs a GPU" are the exception.
"""

from __future__ import annotations

import os
import signal

import pytest

NO_SKIP = "CI_NO_SKIP"
ALLOWED = "needs a GPU"

_skipped: list[str] = []

# What a shell starts in the background ignores Ctrl-C, and so would all children that tests send it to.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Notes every test skipped."""
    _note(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Notes every module skipped."""
    _note(report)


def _note(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if not reason.startswith(ALLOWED):
            _skipped.append(f"{report.nodeid}: {reason}")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails the session for them."""
    if _skipped and os.environ.get(NO_SKIP) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says so."""
    if _skipped and os.environ.get(NO_SKIP):
        terminalreporter.section(f"{NO_SKIP} is set, and these tests were skipped", red=True)
        for line in _skipped:
            terminalreporter.line(line)
