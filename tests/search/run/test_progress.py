"""Progress in plain log lines."""

import logging

import pytest

from search.run.progress import track


def test_what_an_earlier_run_did_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "search.run.progress")
    assert list(track(range(6, 8), "search", 6)) == [6, 7]
    assert [record.getMessage().split(",")[0] for record in caplog.records][-1] == "search: 8 of 8"
