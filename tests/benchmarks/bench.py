"""The course script beside the library, in one run on the same stories: seconds, ratios, scores, and whether bars hold.

python tests/benchmarks/bench.py --data FOLDER [--only stages] [--folder results/bench] [--save]

Every measurement is a process of its own, one after the other; let nothing else run meanwhile. With ``--folder`` each
is kept as it ends, and taken from there if what was measured has not changed, so a bench that was cut off goes on.
"""

import datetime
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

import cyclopts
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
from bench_kept import HERE, Result, kept, source_hash
from bench_studies import configurations, run_course_script, run_our_study, run_our_trial, run_script_study
from bench_tables import CC_TOLERANCE, extrapolated, own_lines, rates, score_lines, stage_table, study_table
from compare_ridge import machine
from cyclopts import Parameter

from bert_encoding.demo import demo_stories
from bert_encoding.demo_names import DEMOS

Part = Literal["stages", "study", "base", "growth"]
N_STORIES = 20
PARTS: tuple[Part, ...] = ("stages", "study", "base", "growth")
SETTINGS_OF_SCRIPT = (
    "lora_alpha lora_dropout weight_decay max_grad_norm warmup_epochs batch_size window_tokens stride "
    "embed_window_tokens embed_stride mask_probability delays ridge_alphas n_folds probe_tokens"
).split()
SOURCES_OF_SCRIPT = (
    "tests/benchmarks/course_script.py",
    "bert_encoding/datasets/*.py",
    "bert_encoding/demo.py",
    "bert_encoding/encoders.py",
    "bert_encoding/windows.py",
    "bert_encoding/masking.py",
    "bert_encoding/finetune.py:make_probes",
)
SOURCES_OF_OURS = ("bert_encoding/*.py", "bert_encoding/datasets/*.py", "tests/benchmarks/bench_ours.py")
SOURCES_OF_STUDY = (
    "bert_encoding/*.py",
    "bert_encoding/datasets/*.py",
    "study/*.py",
    "tests/benchmarks/bench_studies.py",
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
    gpu_tokens_per_second: float = Projection().gpu_tokens_per_second,
    gpu_speedup: float = Projection().gpu_speedup,
    read_gb_per_second: float = Projection().read_gb_per_s,
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
    stories, voxels
        Sizes of the growth. [default: 5, 10, 20, 40 stories, of the demo what it has; 100, 1000, 10000 voxels]
    folder
        Where results are kept. [default: nowhere]
    save
        Also write the tables to bench-DATE.txt beside this file.
    gpu_tokens_per_second, gpu_speedup, read_gb_per_second
        Assumptions of the projection: fine-tuning of BERT-base, ridge on a GPU over ridge here, reading responses.
    """
    with tempfile.TemporaryDirectory() as temporary:
        given = data if data in DEMOS else str(Path(data).resolve())
        n_most = demo_size() if data in DEMOS else max(STORIES)
        n_stories = train_stories or min(N_STORIES, n_most)
        sizes = stories or tuple(n for n in STORIES if n <= n_most)
        shared = {"data": given, "model": model, "train_stories": n_stories, "epochs": epochs}
        bench = Bench(folder or Path(temporary), shared)
        wanted = Projection(
            gpu_tokens_per_second=gpu_tokens_per_second, gpu_speedup=gpu_speedup, read_gb_per_s=read_gb_per_second
        )
        makers = {
            "stages": bench.stages,
            "study": lambda: bench.study(configurations_),
            "base": lambda: bench.base(base_steps),
            "growth": lambda: bench.growth(sizes, voxels, wanted),
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
        print(f"written: {file}")


class Bench:
    """Measures what is asked for, once, and makes tables of it.

    Attributes
    ----------
    folder : where results are kept
    shared : options of all runs
    """

    def __init__(self, folder: Path, shared: Result) -> None:
        self.folder, self.shared, self.machine = folder, shared, machine()
        self.settings = _settings()

    def headline(self) -> str:
        """Say when, where and on what."""
        options = ", ".join(f"{name} {value}" for name, value in self.shared.items() if name != "data")
        name = Path(self.shared["data"]).name
        return f"{datetime.date.today().isoformat()}, {self.machine}; data {name}, {options}"

    def script(self, options: Result, **meaning: str) -> Result:
        """Return a run of the course script; ``meaning`` replaces what only this run knows by that name."""
        asked, run = self._asked(options) | {"settings": self.settings}, options | meaning
        return kept(self.folder, "script", asked, source_hash(*SOURCES_OF_SCRIPT), lambda: run_course_script(run))

    def ours(self, options: Result, **meaning: str) -> Result:
        """Return a trial of ours; ``meaning`` as of ``script``."""
        asked, run = self._asked(options), options | meaning
        return kept(self.folder, "ours", asked, source_hash(*SOURCES_OF_OURS), lambda: run_our_trial(run))

    def stages(self) -> list[str]:
        """One trial of each, ours scoring once and after every epoch."""
        script, once = self.script(self.shared), self.ours(self.shared)
        every = self.ours(self.shared | {"score_every": 1})
        columns = [("ours", rates(once)), ("every epoch", rates(every))]
        return [
            *stage_table(rates(script), columns),
            *score_lines(script, once),
            f"threads: script {script['n_threads']}, ours {once['n_threads']}; device {once['device']}; tokens without "
            f"padding; ours scores once, as the script does, or after every epoch ({self.shared['epochs']} times)",
            *own_lines(once),
        ]

    def study(self, n: int) -> list[str]:
        """So many configurations: the script once for each, ours as a study, and as a study that stops early."""
        points = configurations(n)
        script = run_script_study(points, lambda point: self.script(self.shared | point)) | {"points": points}
        same, early = (self._our_study(points, stops, script["best"] - CC_TOLERANCE) for stops in (False, True))
        first = f"{n} configurations; ours ran {same['at_once']} at once, and two baselines before"
        return [first, *study_table(script, same, early)]

    def _our_study(self, points: list[dict[str, Any]], early: bool, enough: float) -> Result:
        asked = self._asked(self.shared) | {"points": points, "early": early, "enough": enough}
        sources = source_hash(*SOURCES_OF_STUDY)
        return kept(self.folder, "study", asked, sources, lambda: run_our_study(self.shared, points, early, enough))

    def base(self, n_steps: int) -> list[str]:
        """An encoder as large as BERT-base with random weights: a part of a trial, made whole by tokens and words."""
        with tempfile.TemporaryDirectory() as temporary:
            model = str(make_base_encoder(Path(temporary) / "base"))
            options = self.shared | {"model": "random, sized as BERT-base", "max_steps": n_steps, "embed_stories": 2}
            script, ours = self.script(options, model=model), self.ours(options, model=model)
        return [
            f"BERT-base-sized, random weights: {n_steps} training steps, 2 stories embedded, ridge whole on random",
            "word vectors; the trial is EXTRAPOLATED from these by tokens and words",
            *stage_table(extrapolated(script), [("ours", extrapolated(ours))]),
        ]

    def growth(self, stories: tuple[int, ...], voxels: tuple[int, ...], wanted: Projection) -> list[str]:
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
            *projection_lines(wanted, project(wanted, by_stories[-1], by_voxels[-1])),
        ]

    def _at_once(self, n: int, has_gpu: bool) -> Result:
        asked, sources = self._asked(self.shared) | {"at_once": n}, source_hash(*SOURCES_OF_OURS)
        return kept(self.folder, "at-once", asked, sources, lambda: measure_at_once(self.shared, n, has_gpu))

    def _asked(self, options: Result) -> Result:
        return {"options": options, "machine": self.machine}


def demo_size() -> int:
    """Return how many stories of the demo are not test stories."""
    return len(demo_stories().stories) - len(demo_stories().published_test)


def make_base_encoder(folder: Path) -> Path:
    """Write an encoder of BERT-base's size with random weights and the tokenizer of ``minilm``; return its folder."""
    import torch
    from transformers import BertConfig, BertForMaskedLM

    from bert_encoding.encoders import load_encoder, quiet

    torch.manual_seed(0)
    with quiet():
        load_encoder("minilm").tokenizer.save_pretrained(folder)
        BertForMaskedLM(BertConfig()).save_pretrained(folder)
    return folder


def _settings() -> Result:
    """Return the settings that the course script takes from the library's defaults."""
    from bert_encoding.config import TrialConfig

    config = TrialConfig()
    return {name: getattr(config, name) for name in SETTINGS_OF_SCRIPT}


if __name__ == "__main__":
    app()
