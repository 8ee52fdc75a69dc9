"""The course script beside the library, in one run on the same stories: seconds, ratios, scores, and whether bars hold.

python tests/benchmarks/bench.py --data FOLDER [--only stages] [--folder results/bench] [--save]

Every measurement is a process of its own, one after the other; let nothing else run meanwhile. With ``--folder`` each
is kept as it ends, and taken from there if what was measured has not changed, so a bench that was cut off goes on.
"""

import datetime
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import cyclopts
import torch
from bench_growth import (
    AT_ONCE,
    STORIES,
    VOXELS,
    Projection,
    at_once_lines,
    growth_lines,
    measure_at_once,
    project,
    projection_lines,
)
from bench_kept import HERE, ROOT, Result, data_fingerprint, kept, source_hash, versions
from bench_studies import configurations, run_course_script, run_our_study, run_our_trial, run_script_study
from bench_tables import (
    check_alike,
    extrapolated,
    own_lines,
    rates,
    score_lines,
    setting_lines,
    stage_table,
    study_table,
)
from compare_ridge import machine
from course_script import open_data
from cyclopts import Parameter
from transformers import BertConfig, BertForMaskedLM

from bert_encoding.core.errors import InputError
from bert_encoding.core.names import DEMOS
from bert_encoding.language_model.encoder import load_encoder, quiet
from bert_encoding.trial.config import TrialConfig

Part = Literal["stages", "study", "base", "growth"]
N_STORIES = 20
DEMO_FOLDER = ROOT / "bert_encoding" / "demo" / "data"
PARTS: tuple[Part, ...] = ("stages", "study", "base", "growth")
# What the script takes from the library and its numbers rest on. Not finetune.py, whose speed changes: the script only
# draws probes with it, and check_alike refuses others. The settings of TrialConfig are part of the question.
SOURCES_OF_SCRIPT = (
    "tests/benchmarks/course_script.py",
    "bert_encoding/datasets/*.py",
    "bert_encoding/language_model/encoder.py",
    "bert_encoding/demo/stories.py",
    "bert_encoding/demo/simulated_listeners.py",
)
SOURCES_OF_OURS = ("bert_encoding/**/*.py", "tests/benchmarks/bench_ours.py", "tests/benchmarks/course_script.py")
SOURCES_OF_STUDY = ("bert_encoding/**/*.py", "study/**/*.py", "tests/benchmarks/bench_studies.py")

app = cyclopts.App(help=__doc__, default_parameter=Parameter(negative=""))


@app.default
def main(
    *,
    data: str = "demo",
    model: str = "minilm",
    train_stories: int | None = None,
    epochs: int = 3,
    only: Annotated[list[Part] | None, Parameter(consume_multiple=True)] = None,
    configurations_: Annotated[int, Parameter(name="--configurations")] = 8,
    base_steps: int = 30,
    stories: Annotated[tuple[int, ...] | None, Parameter(consume_multiple=True)] = None,
    voxels: Annotated[tuple[int, ...], Parameter(consume_multiple=True)] = VOXELS,
    folder: Path | None = None,
    save: bool = False,
) -> None:
    """Measure, and print a table of each part.

    Parameters
    ----------
    data
        'demo', or the folder of the data.
    model
        The encoder of all parts but base.
    train_stories
        Stories of a trial, fit and validation together. [default: 20, or all of the demo]
    epochs
        Of fine-tuning.
    only
        Of stages (one trial), study (several configurations), base (an encoder as large as BERT-base, in part) and
        growth (cost against stories, voxels and trials at once). [default: all]
    configurations_
        Of the study.
    base_steps
        Training steps of the large encoder.
    stories
        Numbers of stories of the growth. [default: 5, 10, 20, 40, of the demo what it has]
    voxels
        Numbers of voxels of the growth.
    folder
        Where results are kept. [default: nowhere]
    save
        Also write the tables to bench-DATE.txt beside this file.
    """
    with tempfile.TemporaryDirectory() as temporary:
        given = data if data in DEMOS else str(Path(data).resolve())
        n_most = n_train_stories(given)
        n_stories = train_stories or min(N_STORIES, n_most)
        sizes = stories or tuple(n for n in STORIES if n <= n_most)
        shared = {"data": given, "model": model, "train_stories": n_stories, "epochs": epochs}
        bench = Bench((folder or Path(temporary)).resolve(), shared)
        makers = {
            "stages": bench.stages,
            "study": lambda: bench.study(configurations_),
            "base": lambda: bench.base(base_steps),
            "growth": lambda: bench.growth(sizes, voxels),
        }
        lines = [bench.headline()]
        print(lines[0], flush=True)
        for part in only or PARTS:
            made = ["", f"== {part} ==", *makers[part]()]
            print("\n".join(made), flush=True)
            lines += made
            if save:
                file = HERE / f"bench-{datetime.date.today().isoformat()}.txt"
                file.write_text("\n".join(lines) + "\n")
                print(f"written: {file}", flush=True)


class Bench:
    """Measures what is asked for, once, and makes tables of it.

    Attributes
    ----------
    folder : where results are kept
    shared : options of all runs
    """

    def __init__(self, folder: Path, shared: Result) -> None:
        self.folder, self.shared = folder, shared
        data = DEMO_FOLDER if shared["data"] in DEMOS else Path(shared["data"])
        self.fixed = {"machine": machine(), "data": data_fingerprint(data), "versions": versions()}

    def headline(self) -> str:
        """Say when, where and on what."""
        options = ", ".join(f"{name} {value}" for name, value in self.shared.items() if name != "data")
        name = Path(self.shared["data"]).name
        return f"{datetime.date.today().isoformat()}, {self.fixed['machine']}; data {name}, {options}"

    def script(self, options: Result) -> Result:
        """Return a run of the course script."""
        asked = self._asked(options) | {"settings": asdict(TrialConfig())}
        return kept(self.folder, "script", asked, source_hash(*SOURCES_OF_SCRIPT), lambda: run_course_script(options))

    def ours(self, options: Result) -> Result:
        """Return a trial of ours."""
        asked = self._asked(options)
        return kept(self.folder, "ours", asked, source_hash(*SOURCES_OF_OURS), lambda: run_our_trial(options))

    def stages(self) -> list[str]:
        """One trial of each; ours scoring once, after every epoch, and once with the dropout of the script."""
        script, once = self.script(self.shared), self.ours(self.shared)
        check_alike(script, once)
        every = self.ours(self.shared | {"score_every": 1})
        dropping = self.ours(self.shared | {"attention_dropout": script["dropout"]["attention"]})
        alike = [("ours", once), ("ours, dropout as the script's", dropping)]
        columns = [alike[0], ("every epoch", every), alike[1]]
        return [
            *stage_table(rates(script), [(name, rates(found)) for name, found in columns]),
            *score_lines(script, alike),
            f"ours scores once, as the script does, or after every epoch ({self.shared['epochs']} times)",
            *setting_lines(script, alike),
            *own_lines(once),
        ]

    def study(self, n: int) -> list[str]:
        """So many configurations: the script once for each, ours as a study, and as a study that stops early."""
        points, ours = configurations(n), self.ours(self.shared)

        def run_one(point: dict[str, Any]) -> Result:
            found = self.script(self.shared | point)
            check_alike(found, ours)
            return found

        script = run_script_study(points, run_one)
        same, early = (self._our_study(points, stops) for stops in (False, True))
        first = f"{n} configurations; ours ran {same['at_once']} at once, and two baselines before"
        return [first, *study_table(script, same, early)]

    def _our_study(self, points: list[dict[str, Any]], early: bool) -> Result:
        asked = self._asked(self.shared) | {"points": points, "early": early}
        sources = source_hash(*SOURCES_OF_STUDY)
        return kept(self.folder, "study", asked, sources, lambda: run_our_study(self.shared, points, early))

    def base(self, n_steps: int) -> list[str]:
        """An encoder as large as BERT-base with random weights: a part of a trial, made whole by tokens and words."""
        with base_encoder(self.folder / "base-sized") as model:
            options = self.shared | {"model": str(model), "max_steps": n_steps, "embed_stories": 2}
            script, ours = self.script(options), self.ours(options)
        check_alike(script, ours)
        return [
            f"BERT-base-sized, random weights: {n_steps} training steps, 2 stories embedded, ridge whole on random",
            "word vectors; the trial is EXTRAPOLATED from these by tokens and words",
            *stage_table(extrapolated(script), [("ours", extrapolated(ours))]),
            *setting_lines(script, [("ours", ours)]),
        ]

    def growth(self, stories: tuple[int, ...], voxels: tuple[int, ...]) -> list[str]:
        """Seconds of a trial of ours against stories, voxels, and trials at once; the large study projected."""
        by_stories = [self.ours(self.shared | {"train_stories": n}) for n in stories]
        by_voxels = [self.ours(self.shared | {"voxels": n}) for n in voxels]
        at_once = [self._at_once(n, by_stories[0]["device"] == "cuda") for n in AT_ONCE]
        return [
            *growth_lines("stories", stories, by_stories),
            "",
            *growth_lines("voxels", voxels, by_voxels),
            "",
            *at_once_lines(AT_ONCE, at_once),
            "",
            *projection_lines(Projection(), project(Projection(), by_stories, by_voxels)),
        ]

    def _at_once(self, n: int, has_gpu: bool) -> Result:
        asked, sources = self._asked(self.shared) | {"at_once": n}, source_hash(*SOURCES_OF_OURS)
        return kept(self.folder, "at-once", asked, sources, lambda: measure_at_once(self.shared, n, has_gpu))

    def _asked(self, options: Result) -> Result:
        return {"options": options} | self.fixed


def n_train_stories(data: str) -> int:
    """Return how many stories of the data are not test stories; say what is wrong with them before hours are spent."""
    try:
        _, split = open_data(data, None)
    except InputError as error:
        sys.exit(f"error: {error}")
    return len(split.fit) + len(split.validation)


@contextmanager
def base_encoder(folder: Path) -> Iterator[Path]:
    """Write an encoder of BERT-base's size with random weights and the tokenizer of ``minilm``, for a while."""
    torch.manual_seed(0)
    try:
        with quiet():
            load_encoder("minilm").tokenizer.save_pretrained(folder)
            BertForMaskedLM(BertConfig()).save_pretrained(folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    app()
