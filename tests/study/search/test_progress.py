"""The progress line: what a log file holds after a study, with a clock that is set by hand."""

import io
from types import SimpleNamespace
from typing import Any

from make_searcher import finished, searcher
from rich.console import Console

from study.search.progress import ProgressLine
from study.setup.spaces import load_space


class Play:
    """A study that is played to a progress line."""

    def __init__(self, n_trials: int = 4, **given: Any) -> None:
        self.time, self.out = 0.0, io.StringIO()
        self.searcher = searcher(n_trials=n_trials, **given)
        console, records = Console(file=self.out, width=400), given.get("records", [])
        self.line = ProgressLine(console, self.searcher, records, 3, clock=lambda: self.time)

    def begin(self, name: str) -> str:
        job = self.searcher.suggest(name)
        self.line.on_trial_start(0, [], SimpleNamespace(trial_id=name, config=job))
        return str(job["trial_id"])

    def epoch(self, name: str, at: int) -> None:
        job = self.searcher.jobs[name]
        self.line.on_trial_result(0, [], SimpleNamespace(trial_id=name), {"job": job.trial_id, "epoch": float(at)})

    def end(self, name: str, status: str = "COMPLETE", value: float | None = 0.1, **more: Any) -> None:
        job = self.searcher.jobs[name]
        result = {"job": job.trial_id, "phase": job.phase, "status": status, "value": value, "ended": True, **more}
        self.searcher.on_trial_complete(name, result)
        self.line.on_trial_result(0, [], SimpleNamespace(trial_id=name), result)

    def wait(self, seconds: float) -> None:
        """Let time pass; Ray Tune comes by ten times a second."""
        for _ in range(round(seconds * 10)):
            self.time += 0.1
            self.line.on_step_end(0, [])

    @property
    def lines(self) -> list[str]:
        return self.out.getvalue().splitlines()


def test_a_log_holds_a_line_a_trial_with_best_frozen_and_time_left() -> None:
    play = Play(jobs=("frozen",))
    for name, value in (("a", 0.2), ("b", 0.21), ("c", 0.19)):
        play.begin(name)
        play.wait(30)
        play.end(name, value=value)
    assert play.lines == [
        "[search 1/5] baseline-frozen: CC 0.2000 | best CC -, frozen 0.2000 | time left: not known yet",
        "[search 2/5] 0001: CC 0.2100 | best CC 0.2100 (0001), frozen 0.2000 | about 2 min left",
        "[search 3/5] 0002: CC 0.1900 | best CC 0.2100 (0001), frozen 0.2000 | about 60 s left",
    ]


def test_a_long_trial_is_heard_of_once_a_minute_also_during_baselines() -> None:
    play = Play(jobs=("frozen", "word_rate"))
    play.begin("a")
    play.begin("b")
    play.wait(130)
    assert [line.split(" | ")[0] for line in play.lines] == [
        "[search 0/6] running baseline-frozen, baseline-word_rate"
    ] * 2
    play.end("a")
    play.end("b")
    for name in "cdef":
        play.begin(name)
    play.epoch("c", 2)
    play.wait(59)
    assert len(play.lines) == 4, "a line a minute at most beside the results"
    play.wait(2)
    assert play.lines[-1].split(" | ")[0] == "[search 2/6] running 0001 epoch 2/3, 0002, 0003, 1 more"


def test_how_a_trial_ended_is_said() -> None:
    play = Play()
    for name in "abcd":
        play.begin(name)
    play.end("a", "STOPPED", 0.05, epochs_done=1.0)
    play.end("b", "FAILED", None, error="Traceback ...\nFloatingPointError: the loss is not finite")
    play.searcher.reasons["c"] = "no end after 9 s (--trial-timeout)"
    for name in "cd":
        play.searcher.on_trial_complete(name, error=True)
        play.line.on_trial_error(0, [], SimpleNamespace(trial_id=name))
    assert [line.split(" | ")[0] for line in play.lines] == [
        "[search 1/4] 0001: CC 0.0500, stopped after epoch 1/3",
        "[search 2/4] 0002: FAILED: FloatingPointError: the loss is not finite",
        "[search 3/4] 0003: FAILED: no end after 9 s (--trial-timeout)",
        "[search 4/4] 0004: FAILED: its worker died 3 times",
    ]
    assert "best CC -" in play.lines[0], "a trial that was stopped is not the best one"
    assert play.line.running == {}


def test_the_best_of_earlier_sessions_counts_and_the_time_left_has_a_fitting_unit() -> None:
    space = load_space("lora_full")
    params = {"log2_rank": 2, "alpha_factor": 1.0, "target_modules": "all", "lr": 1e-4, "stride": 128}
    for seconds, text in ((50, "about 50 s"), (600, "about 10 min"), (7200, "about 2.0 h")):
        play = Play(space=space, records=[finished(space, params, 1, 0.3)], first_id=2, n_trials=3)
        with play.line:
            play.begin("a")
            play.time = seconds
            play.end("a", value=0.2)
        (line,) = play.lines
        assert line.endswith(f" | best CC 0.3000 (0001), frozen - | {text} left")
        assert play.out.getvalue() == f"{line}\n", "no blank line follows"


def test_a_terminal_gets_no_lines_of_a_log() -> None:
    play = Play()
    play.line.console = Console(file=play.out, force_terminal=True, width=100)
    play.begin("a")
    play.wait(200)
    play.end("a")
    assert "[search" not in play.out.getvalue()


def test_one_trial_of_many_tells_nothing_of_the_time_left() -> None:
    """Of eight at once the first to end would promise eight times too long a wait."""
    play = Play(n_trials=11)
    for name in "abc":
        play.begin(name)
    for name in "abc":
        play.wait(10)
        play.end(name)
    assert [line.rpartition(" | ")[2] for line in play.lines] == [
        "time left: not known yet",
        "about 2 min left",
        "about 80 s left",
    ]
    ten = Play(n_trials=10)
    ten.begin("a")
    ten.wait(20)
    ten.end("a")
    assert ten.lines[0].endswith("about 3 min left"), "a tenth has ended"
