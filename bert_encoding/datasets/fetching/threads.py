"""Work on many items in threads that an interrupt need not wait for."""

from collections.abc import Callable, Sequence
from multiprocessing.pool import ThreadPool
from typing import TypeVar

from bert_encoding.core.errors import InputError
from bert_encoding.datasets.fetching.http_client import Client, PermanentError, Stopped

RESUME = "run the same command again to resume"
NOT_TRIED = InputError("not tried")
Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_threads(work: Callable[[Item], Result], items: Sequence[Item], client: Client) -> list[Result]:
    """Return ``[work(item) for item in items]``, with one thread per connection of the client.

    If an item fails, the others are still processed, until as many failures in a row as there are connections were
    permanent; then InputError is raised, with the first message and the number of other failures. The threads are
    daemons: those of ``concurrent.futures`` would delay the end of an interrupted program.
    """
    n_threads = client.n_connections
    was_permanent: list[bool] = []  # appended to by all threads, in the order in which items end

    def attempt(item: Item) -> Result | InputError:
        if client.stop.is_set() or (len(was_permanent) >= n_threads and all(was_permanent[-n_threads:])):
            return NOT_TRIED
        try:
            outcome: Result | InputError = work(item)
        except Stopped:
            return NOT_TRIED
        except InputError as error:
            outcome = error
        except Exception:
            client.stop.set()
            raise
        was_permanent.append(isinstance(outcome, PermanentError))
        return outcome

    with ThreadPool(n_threads) as pool:
        pending = pool.map_async(attempt, items, chunksize=1)
        while not pending.ready():
            pending.wait(0.2)  # a wait without limit would not see an interrupt on every system
        outcomes = pending.get()
        pool.close()
        pool.join()
    failures = [outcome for outcome in outcomes if isinstance(outcome, InputError)]
    if failures:
        raise _summary(failures)
    return [outcome for outcome in outcomes if not isinstance(outcome, InputError)]


def _summary(failures: list[InputError]) -> InputError:
    n_not_tried = failures.count(NOT_TRIED)
    first, *others = [failure for failure in failures if failure is not NOT_TRIED] or [NOT_TRIED]
    more = f"; {len(others)} more failed" if others else ""
    not_tried = f"; {n_not_tried} not tried" if n_not_tried else ""
    return InputError(f"{first}{more}{not_tried}; {RESUME}")
