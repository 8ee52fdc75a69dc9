"""Compare the course script with the library on the same stories: seconds, ratios, scores, and whether bars hold.

python tests/benchmarks/bench.py --data FOLDER [--only stages] [--folder results/bench] [--save]

Each measurement runs in its own process, one after the other, on an otherwise idle machine. With ``--folder`` each
result is saved as it ends and reused while the measured code is unchanged, so an interrupted bench resumes.
"""

import datetime
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import bench_tables as tables
import cyclopts
import torch
from bench_runs import HERE, ROOT, Result, data_fingerprint, measure_once, run_script, source_hash, versions
from bench_studies import configurations, measure_at_once, run_our_study, run_script_study
from compare_ridge import machine
from course_script import open_and_split
from cyclopts import Parameter
from transformers import BertConfig, BertForMaskedLM

from bert_encoding.core.errors import InputError
from bert_encoding.core.names import DEMOS
from bert_encoding.language_model.encoder import load_encoder, quiet

Part = Literal["stages", "study", "base", "growth"]
N_STORIES = 20
DEMO_FOLDER = ROOT / "bert_encoding" / "demo" / "data"
PARTS: tuple[Part, ...] = ("stages", "study", "base", "growth")
STORIES, VOXELS, AT_ONCE = (5, 10, 20, 40), (100, 1000, 10000), (1, 2)
# What the script takes from the library and its numbers rest on. Not masked_lm.py, whose speed changes: the script only
# draws probes with it, and check_alike refuses others.
SOURCES_OF_SCRIPT = (
    *("tests/benchmarks/course_script.py", "bert_encoding/trial/config.py", "bert_encoding/datasets/*.py"),
    *("bert_encoding/language_model/encoder.py", "bert_encoding/demo/*.py"),
)
SOURCES_OF_OURS = (
    *("bert_encoding/**/*.py", "study/**/*.py", "tests/benchmarks/bench_ours.py", "tests/benchmarks/bench_studies.py"),
    "tests/benchmarks/course_script.py",
)

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
        Folder for saved results. [default: none]
    save
        Also write the tables to bench-DATE.txt next to this file.
    """
    with tempfile.TemporaryDirectory() as temporary:
        source = data if data in DEMOS else str(Path(data).resolve())
        n_most = n_train_stories(source)
        n_stories = train_stories or min(N_STORIES, n_most)
        sizes = stories or tuple(n for n in STORIES if n <= n_most)
        shared = {"data": source, "model": model, "train_stories": n_stories, "epochs": epochs}
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
            table = ["", f"== {part} ==", *makers[part]()]
            print("\n".join(table), flush=True)
            lines += table
            if save:
                file = HERE / f"bench-{datetime.date.today().isoformat()}.txt"
                file.write_text("\n".join(lines) + "\n")
                print(f"written: {file}", flush=True)


class Bench:
    """Run the measurements, each once, and format them as tables.

    Attributes
    ----------
    folder : of saved results
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

    def once(self, name: str, options: Result, measure: Callable[[], Result], **more: Any) -> Result:
        """Return the saved result of the same options, machine, data, versions and sources, or measure it."""
        sources = source_hash(*(SOURCES_OF_SCRIPT if name == "script" else SOURCES_OF_OURS))
        question = {"options": options, "sources": sources} | self.fixed | more
        return measure_once(self.folder, name, question, measure)

    def script(self, options: Result) -> Result:
        """Return a run of the course script."""
        return self.once("script", options, partial(run_script, "course_script.py", options))

    def ours(self, options: Result) -> Result:
        """Return a trial of ours."""
        return self.once("ours", options, partial(run_script, "bench_ours.py", options))

    def stages(self) -> list[str]:
        """One trial of each; ours scoring once, after every epoch, and once with the dropout of the script."""
        script, once = self.script(self.shared), self.ours(self.shared)
        tables.check_alike(script, once)
        every = self.ours(self.shared | {"score_every": 1})
        dropping = self.ours(self.shared | {"attention_dropout": script["dropout"]["attention"]})
        alike = [("ours", once), ("ours, dropout as the script's", dropping)]
        columns = [alike[0], ("every epoch", every), alike[1]]
        return [
            *tables.stage_table(tables.rates(script), [(name, tables.rates(result)) for name, result in columns]),
            *tables.score_lines(script, alike),
            f"ours scores once, as the script does, or after every epoch ({self.shared['epochs']} times)",
            *tables.setting_lines(script, alike),
            *tables.own_lines(once),
        ]

    def study(self, n: int) -> list[str]:
        """Run ``n`` configurations: the script once for each, ours as a study, and as a study that stops early."""
        points, ours = configurations(n), self.ours(self.shared)

        def run_one(point: dict[str, Any]) -> Result:
            result = self.script(self.shared | point)
            tables.check_alike(result, ours)
            return result

        script = run_script_study(points, run_one)
        same, early = (
            self.once(
                "study", self.shared, partial(run_our_study, self.shared, points, stops), points=points, early=stops
            )
            for stops in (False, True)
        )
        first = f"{n} configurations; ours ran {same['at_once']} at once, and two baselines before"
        return [first, *tables.study_table(script, same, early)]

    def base(self, n_steps: int) -> list[str]:
        """An encoder as large as BERT-base with random weights: part of a trial, extrapolated by tokens and words."""
        with base_encoder(self.folder / "base-sized") as model:
            options = self.shared | {"model": str(model), "max_steps": n_steps, "embed_stories": 2}
            script, ours = self.script(options), self.ours(options)
        tables.check_alike(script, ours)
        return [
            f"BERT-base-sized, random weights: {n_steps} training steps, 2 stories embedded, ridge whole on random",
            "word vectors; the trial is EXTRAPOLATED from these by tokens and words",
            *tables.stage_table(tables.extrapolated(script), [("ours", tables.extrapolated(ours))]),
            *tables.setting_lines(script, [("ours", ours)]),
        ]

    def growth(self, stories: tuple[int, ...], voxels: tuple[int, ...]) -> list[str]:
        """Seconds of a trial of ours against stories, voxels, and trials at once."""
        by_stories = [self.ours(self.shared | {"train_stories": n}) for n in stories]
        by_voxels = [self.ours(self.shared | {"voxels": n}) for n in voxels]
        has_gpu = by_stories[0]["device"] == "cuda"
        at_once = [
            self.once("at-once", self.shared, partial(measure_at_once, self.shared, n, has_gpu), at_once=n)
            for n in AT_ONCE
        ]
        lines = [*tables.growth_lines("stories", stories, by_stories), ""]
        lines += [*tables.growth_lines("voxels", voxels, by_voxels), ""]
        return lines + tables.at_once_lines(AT_ONCE, at_once)


def n_train_stories(data: str) -> int:
    """Return how many stories of the data are not test stories; refuse bad data before hours are spent."""
    try:
        _, split = open_and_split(data, None)
    except InputError as error:
        sys.exit(f"error: {error}")
    return len(split.fit) + len(split.validation)


@contextmanager
def base_encoder(folder: Path) -> Iterator[Path]:
    """Write an encoder of BERT-base's size with random weights and the tokenizer of ``minilm``, then delete it."""
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
