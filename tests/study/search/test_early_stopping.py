"""Early stopping: which trials the rules stop, what Optuna knows, and the way from driver to worker."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from make_searcher import finished, searcher

from bert_encoding.core.names import METRICS
from bert_encoding.trial.record import TrialRecord
from study.search.early_stopping import StopBoard, StopSignal
from study.search.searcher import StudySearcher
from study.search.worker import curve
from study.setup.samplers import SCHEDULERS
from study.setup.spaces import Space, load_space


@pytest.fixture
def space(tmp_path: Any) -> Space:
    """A space with one number."""
    (tmp_path / "one.py").write_text("def space(trial):\n    return {'lr': trial.suggest_float('lr', 0.01, 0.9)}\n")
    return load_space(str(tmp_path / "one.py"))


def stopping(space: Space, rule: str = "asha", **changes: Any) -> StudySearcher:
    """Return a searcher that stops trials early, whose stop signal only remembers."""
    board = StopBoard()
    signal = SimpleNamespace(board=board, put=board.put)
    return searcher(space, n_trials=12, scheduler=rule, stop_signal=signal, **changes)


def epoch(trial: str, at: int, cc: float) -> dict[str, Any]:
    return {"job": trial, "epoch": float(at), "cc_mean": cc, "mlm_loss_train": 2.0}


def play(search: StudySearcher, curves: list[list[float]]) -> list[int]:
    """Report trials one after the other, each epoch by epoch until the signal says stop; return how many each ran."""
    n_epochs = []
    for name, values in ((f"ray{index}", values) for index, values in enumerate(curves)):
        job = search.suggest(name)
        for at, value in enumerate(values, 1):
            search.on_trial_result(name, epoch(job["trial_id"], at, value))
            if at < len(values) and search.stop_signal.board.should_stop(job["trial_id"], at):
                break
        status = "COMPLETE" if at == len(values) else "STOPPED"
        curve_of_trial = list(enumerate(values[:at], 1))
        search.on_trial_complete(name, {"status": status, "value": value, "curve": curve_of_trial, "ended": True})
        n_epochs.append(at)
    return n_epochs


def rising(value: float) -> list[float]:
    return [value * at for at in (1, 2, 3, 4)]


def halving_by_hand(curves: list[list[float]]) -> list[int]:
    """Asynchronous successive halving with a factor of two: at 1, 2, 4, ... epochs go on if among the better half."""
    rungs: dict[int, list[float]] = {}
    given = []
    for values in curves:
        for at, value in enumerate(values, 1):
            if at & (at - 1) == 0:  # a power of two
                rung = rungs.setdefault(at, [])
                rung.append(value)
                n_better_half = max(1, len(rung) // 2)
                if value < sorted(rung, reverse=True)[n_better_half - 1]:
                    break
        given.append(at)
    return given


def median_by_hand(curves: list[list[float]]) -> list[int]:
    """Stop below the median, at the same epoch, of the complete trials, once there are five."""
    complete: list[list[float]] = []
    given = []
    for values in curves:
        for at in range(1, len(values) + 1):
            others = sorted(other[at - 1] for other in complete)
            n = len(others)
            if n >= 5 and max(values[:at]) < (others[(n - 1) // 2] + others[n // 2]) / 2:
                break
        if at == len(values):
            complete.append(values)
        given.append(at)
    return given


CURVES = [rising(value) for value in (0.5, 0.2, 0.6, 0.55, 0.9, 0.1, 0.3, 0.95, 0.65, 0.91, 0.05, 0.7)]


@pytest.mark.parametrize(("rule", "by_hand"), [("asha", halving_by_hand), ("median", median_by_hand)])
def test_a_rule_stops_what_it_should(
    rule: str, by_hand: Callable[[list[list[float]]], list[int]], space: Space
) -> None:
    given = play(stopping(space, rule), CURVES)
    assert given == by_hand(CURVES)
    assert 0 < sum(n < 4 for n in given) < len(CURVES), "some are stopped, some are not"


def test_none_stops_nothing(space: Space) -> None:
    assert play(stopping(space, "none"), CURVES) == [4] * len(CURVES)
    assert set(SCHEDULERS) == {"none", "asha", "median"}


@pytest.mark.parametrize("rule", ["asha", "median"])
def test_a_loss_is_stopped_when_it_is_high(rule: str, space: Space) -> None:
    search = stopping(space, rule, metric=METRICS["adapt"])
    for at in range(6):
        search.suggest(f"ray{at}")
        for step in (1, 2):
            search.on_trial_result(f"ray{at}", {"epoch": step, "mlm_loss_heldout": 3.0 - at / 10})
        search.on_trial_complete(f"ray{at}", {"status": "COMPLETE", "value": 3.0 - at / 10})
    for name, loss in (("low", 1.0), ("high", 4.0)):
        job = search.suggest(name)
        search.on_trial_result(name, {"epoch": 1, "mlm_loss_heldout": loss})
        assert search.stop_signal.board.should_stop(job["trial_id"], 1) == (name == "high")


def test_before_training_nobody_is_stopped(space: Space) -> None:
    search = stopping(space)
    for at in range(4):
        job = search.suggest(f"ray{at}")
        search.on_trial_result(f"ray{at}", epoch(job["trial_id"], 0, -float(at)))
        assert not search.stop_signal.board.should_stop(job["trial_id"], 0)


def known_to_optuna(search: StudySearcher) -> list[tuple[str, float | None, dict[int, float]]]:
    return [(t.state.name, t.value, t.intermediate_values) for t in search.study.get_trials(deepcopy=False)]


def test_a_stopped_trial_is_pruned_with_its_epochs(space: Space) -> None:
    search = stopping(space)
    play(search, [rising(0.5), rising(0.2)])
    assert known_to_optuna(search) == [("COMPLETE", 2.0, {1: 0.5, 2: 1.0, 3: 1.5, 4: 2.0}), ("PRUNED", 0.2, {1: 0.2})]
    assert search.study.best_value == 2.0, "a pruned trial is not the best one"


def test_a_trial_that_is_tried_again_tells_its_epochs_once(space: Space) -> None:
    """Its worker died after the second epoch; Ray runs it anew."""
    search = stopping(space)
    job = search.suggest("a")
    for at, value in ((1, 0.5), (2, 0.6), (1, 0.5), (2, 0.6), (3, 0.7)):
        search.on_trial_result("a", epoch(job["trial_id"], at, value))
    search.on_trial_complete("a", {"status": "COMPLETE", "value": 0.7, "curve": [(1, 0.5), (2, 0.6), (3, 0.7)]})
    assert known_to_optuna(search) == [("COMPLETE", 0.7, {1: 0.5, 2: 0.6, 3: 0.7})]


def record_of(space: Space, lr: float, at: int, values: list[float], status: str) -> TrialRecord:
    record = finished(space, {"lr": lr}, at, values[-1])
    record.status = status
    record.epochs = [{"epoch": float(n), "cc_mean": value} for n, value in enumerate(values, 1)]
    return record


@pytest.mark.parametrize("rule", ["asha", "median"])
def test_a_resumed_search_decides_as_one_that_never_stopped(rule: str, space: Space) -> None:
    whole = stopping(space, rule)
    given = play(whole, CURVES)
    n_before = 7
    records = [
        record_of(space, trial.params["lr"], at + 1, CURVES[at][:n], "COMPLETE" if n == 4 else "STOPPED")
        for at, (trial, n) in enumerate(zip(whole.study.trials[:n_before], given, strict=False))
    ]
    resumed = stopping(space, rule, records=records, first_id=n_before + 1)
    assert known_to_optuna(resumed) == known_to_optuna(whole)[:n_before]
    assert play(resumed, CURVES[n_before:]) == given[n_before:]


def test_a_stopped_configuration_is_answered_from_its_record(space: Space) -> None:
    stopped = record_of(space, 0.5, 1, [0.2], "STOPPED")
    again = Space(**vars(space) | {"start": ({"lr": 0.5},)})
    search = stopping(again, records=[stopped], first_id=2)
    search.waiting.append(({"lr": 0.5}, None))
    assert search.suggest("a")["repeat_of"] == "0001"
    ended = {"status": "STOPPED", "value": 0.2, "curve": curve(stopped, METRICS["encoding"])}
    search.on_trial_complete("a", ended)
    assert known_to_optuna(search) == [("PRUNED", 0.2, {1: 0.2}), ("PRUNED", 0.2, {1: 0.2})]


@pytest.mark.parametrize(("fails", "repeated"), [(False, "0001"), (True, None)])
def test_a_configuration_that_runs_at_this_moment_is_waited_for(
    fails: bool, repeated: str | None, space: Space
) -> None:
    twice = Space(**vars(space) | {"start": ({"lr": 0.5}, {"lr": 0.5}, {"lr": 0.6})})
    search = searcher(twice, n_trials=3)
    assert search.suggest("a")["repeat_of"] is None
    assert search.suggest("b") is None, "it runs already"
    assert search.suggest("c") is None
    search.on_trial_complete("a", {"status": "COMPLETE", "value": 0.1}, error=fails)
    assert (search.suggest("d")["trial_id"], search.jobs["d"].repeat_of) == ("0002", repeated)
    assert search.suggest("e")["params"] == {"lr": 0.6}
    assert search.suggest("f") == StudySearcher.FINISHED


def test_a_board_speaks_of_this_epoch_and_later_ones() -> None:
    board = StopBoard()
    board.put("0001", 2)
    board.put("0001", 3)
    assert [board.should_stop("0001", at) for at in (1, 2, 3)] == [False, True, True]
    assert not board.should_stop("0002", 5)


class Unreachable:
    """A board whose process is gone."""

    class put:
        @staticmethod
        def remote(*given: Any) -> Any:
            raise ray.exceptions.ActorDiedError

    should_stop = put


def test_a_sign_out_of_reach_stops_nobody(caplog: pytest.LogCaptureFixture) -> None:
    stop_signal = StopSignal(Unreachable())
    stop_signal.put("0001", 2)
    assert not stop_signal.should_stop("0001", 2)
    assert "early stopping of trial 0001 after epoch 2 is out of reach" in caplog.text
