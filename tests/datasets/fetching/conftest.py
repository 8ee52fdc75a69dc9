"""A client that waits briefly, for tests of servers that misbehave."""

import pytest

from bert_encoding.datasets.fetching import download, http_client


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"BACKOFF_S": 0.0, "LONGEST_WAIT_S": 0.02, "READ_S": 0.3, "N_RETRIES": 3}.items():
        monkeypatch.setattr(http_client, name, value)
    monkeypatch.setattr(download, "BLOCK_BYTES", 1000)
