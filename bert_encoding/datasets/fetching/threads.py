"""Work on many items in threads that an interrupt need not wait for."""

import queue
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from bert_encoding.core.errors import InputError
from bert_encoding.datasets.fetching.web import Hopeless, Stopped

UNTRIED = InputError("not tried")
GO_ON = "run the same command again to go on"
Item = TypeVar("Item")
Result = TypeVar("Result")


def each(
    work: Callable[[Item], Result], items: Sequence[Item], n_at_once: int, stop: threading.Event
) -> list[Result | InputError]:
    """Do some work on every item in threads, and return what came of each: UNTRIED if that one was not begun.

    No more items are begun once ``n_at_once`` in a row were hopeless. The threads are daemons, so that an interrupt
    need not wait for a silent server.

    Raises
    ------
    Exception
        any error but InputError, after setting ``stop``; KeyboardInterrupt likewise.
    """
    outcomes: list[Result | Exception] = [UNTRIED] * len(items)
    lost: list[bool] = []  # appended to by all threads, in the order in which they end their items
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    for at in range(len(items)):
        todo.put(at)

    def worker() -> None:
        while not stop.is_set() and not (len(lost) >= n_at_once and all(lost[-n_at_once:])):
            try:
                at = todo.get_nowait()
            except queue.Empty:
                return
            outcomes[at] = _outcome(work, items[at], stop)
            lost.append(isinstance(outcomes[at], Hopeless))

    _join([threading.Thread(target=worker, daemon=True) for _ in range(min(n_at_once, len(items)))], stop)
    return [_no_bug(outcome) for outcome in outcomes]


def _outcome(work: Callable[[Item], Result], item: Item, stop: threading.Event) -> Result | Exception:
    try:
        return work(item)
    except Stopped:
        return UNTRIED
    except Exception as error:
        if not isinstance(error, InputError):
            stop.set()
        return error


def _no_bug(outcome: Result | Exception) -> Result | InputError:
    if isinstance(outcome, Exception) and not isinstance(outcome, InputError):
        raise outcome
    return outcome


def _join(threads: list[threading.Thread], stop: threading.Event) -> None:
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)  # a wait without limit would not see an interrupt on every system
    except BaseException:
        stop.set()
        raise


def raise_first(outcomes: Sequence[object]) -> None:
    """Raise an InputError that names the first failure and counts the others, if there was any."""
    failures = [outcome for outcome in outcomes if isinstance(outcome, InputError) and outcome is not UNTRIED]
    if not failures:
        return
    n_others, n_untried = len(failures) - 1, sum(outcome is UNTRIED for outcome in outcomes)
    others = f"; {n_others} more failed" if n_others else ""
    untried = f"; {n_untried} not tried" if n_untried else ""
    raise InputError(f"{failures[0]}{others}{untried}; {GO_ON}") from None
