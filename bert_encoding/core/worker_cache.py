"""What the trials of one process share, so that it is computed once."""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

CACHED_BYTES = 2**30  # of responses

Value = TypeVar("Value")


class WorkerCache:
    """Models, tokens, word vectors and responses that trials share; a worker passes one cache to all of its trials.

    Cached values must not be modified. ``max_bytes`` is the limit of ``get_sized``; None is ``CACHED_BYTES``.
    """

    def __init__(self, max_bytes: int | None = None) -> None:
        self.max_bytes = CACHED_BYTES if max_bytes is None else max_bytes
        self._values: dict[str, dict[Hashable, Any]] = {}
        self._sized: dict[Hashable, tuple[Any, int]] = {}
        self._owner = ""

    def get(self, kind: str, key: Hashable, make: Callable[[], Value], max_values: int | None = None) -> Value:
        """Return the value of a key, computed once; of each kind the ``max_values`` used last are kept."""
        values = self._values.setdefault(kind, {})
        while max_values is not None and key not in values and len(values) >= max_values:
            del values[next(iter(values))]
        values[key] = values.pop(key) if key in values else make()
        return values[key]

    def get_sized(self, owner: str, key: Hashable, make: Callable[[], Value], n_bytes: Callable[[Value], int]) -> Value:
        """Return the value of a key, kept if all values of one owner fit into ``max_bytes``.

        Nothing is evicted to make room: trials request the same values in the same order, so each would be evicted
        shortly before it is requested again. The values of another owner are dropped; an empty name keeps nothing.
        """
        if owner != self._owner:
            self._sized.clear()
            self._owner = owner
        if key in self._sized:
            return self._sized[key][0]
        value = make()
        if owner and self.n_bytes + n_bytes(value) <= self.max_bytes:
            self._sized[key] = (value, n_bytes(value))
        return value

    @property
    def n_bytes(self) -> int:
        """The memory of all values of ``get_sized``."""
        return sum(n_bytes for _, n_bytes in self._sized.values())
