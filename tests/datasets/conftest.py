"""Fixtures of tests with malformed data."""

from pathlib import Path

import pytest
from refusals import Commands

import bert_encoding.analyses.data_report


@pytest.fixture
def both(
    tiny_bert: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_ray: None
) -> Commands:
    """A study and ``check`` in an empty folder; the figure of ``check``, which takes longest, is not drawn."""
    monkeypatch.setattr(bert_encoding.analyses.data_report, "draw_lags", lambda report, file: None)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return Commands(tiny_bert, capsys)
