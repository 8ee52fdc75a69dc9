"""The cache of a worker: values are computed once, and the least recently used make room."""

import pytest

from bert_encoding.core.worker_cache import WorkerCache


def test_values_are_computed_once_per_kind_and_key() -> None:
    cache, computed = WorkerCache(), []
    for kind, key in (("tokens", 1), ("tokens", 1), ("layers", 1), ("tokens", 2)):
        assert cache.get(kind, key, lambda value=(kind, key): (computed.append(value), value)[1]) == (kind, key)
    assert computed == [("tokens", 1), ("layers", 1), ("tokens", 2)]


def test_the_least_recently_used_value_makes_room_before_a_new_one_is_computed() -> None:
    cache, alive = WorkerCache(), []

    def load(name: str) -> str:
        alive.append(len(cache._values["encoder"]))
        return name

    for name in "abacab":
        assert cache.get("encoder", name, lambda name=name: load(name), max_values=2) == name
    assert alive == [0, 1, 1, 1], "a and b, then c instead of b, then b instead of c"


def test_a_value_that_cannot_be_computed_is_not_cached() -> None:
    cache = WorkerCache()
    with pytest.raises(ZeroDivisionError):
        cache.get("encoder", "a", lambda: 1 / 0)
    assert cache.get("encoder", "a", lambda: 5.0) == 5.0
