"""Prepare an encoding study from its options and check it; nothing is run or written."""

import functools
import hashlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bert_encoding.analyses.alignment import inspect_aligned
from bert_encoding.core.errors import InputError
from bert_encoding.core.names import DEMOS
from bert_encoding.datasets.splits import Split, choose_stories, choose_subjects, split_stories
from bert_encoding.datasets.story import TRIMS, Dataset
from bert_encoding.demo import open_data
from bert_encoding.demo.stories import N_VOXELS, simulate_listener
from bert_encoding.language_model.encoder import MINILM_PLAIN, check_layer, check_model_name
from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.pipeline import Task
from bert_encoding.trial.voxel_selection import keep_voxels, read_voxels, voxels_key
from study.setup.options import ALL, Options
from study.setup.resolve import check_task
from study.setup.spaces import Space, rehearse
from study.wording import counted


@dataclass(frozen=True)
class Study:
    """A study before it runs. The demo's responses are simulated only when ``task`` is called."""

    options: Options
    space: Space
    dataset: Dataset
    splits: tuple[Split, ...]
    base: TrialConfig

    @property
    def n_voxels(self) -> dict[str, int]:
        """Number of voxels that are scored, by subject."""
        if self.options.voxels.isdecimal():
            return dict.fromkeys(self.dataset.subjects, int(self.options.voxels))
        if self.dataset.voxel_masks is None:
            return dict.fromkeys(self.dataset.subjects, N_VOXELS)
        return {subject: int(np.sum(mask)) for subject, mask in self.dataset.voxel_masks.items()}

    def about(self, task: Task) -> dict[str, Any]:
        """Return the entries of ``study.json`` on data, voxels and split."""
        dataset, is_open = task.dataset, self.options.voxels.isdecimal() and not task.voxels_are_chosen
        return {
            "data": {
                "source": dataset.source,
                "fingerprint": dataset.fingerprint,
                "n_voxels": self.n_voxels,
                "trim_trs": list(dataset.trim),
                "notes": list(dataset.notes),
            },
            "voxels": {"asked": self.options.voxels, "key": None if is_open else voxels_key(dataset)},
            "splits": [asdict(split) for split in self.splits],
            "general_text": general_text(self.options),
        }

    def task(self) -> Task:
        """Return the input that all trials share."""
        dataset = self.dataset
        if dataset.voxel_masks is None:
            dataset = _select_file_voxels(self.options, simulate_listener(dataset)[0])
        probe, control = general_text_files(self.options)
        return Task(dataset, self.splits, self.options.seed, probe_text=probe, control_text=control)


def prepare(options: Options, space: Space) -> Study:
    """Open the data, split the stories, and check every setting that can be checked without a model."""
    check_task(options, is_text=False)
    check_model_name(options.model)
    base = base_config(options)
    trains = rehearse(space, base)
    if options.trials and trains and options.model == MINILM_PLAIN:
        raise InputError(f"--model {MINILM_PLAIN}: has no masked-LM head to fine-tune; use minilm, or --trials 0")
    heard = dataset = open_data(options.data, TRIMS[options.trim], simulate=False)
    subjects = choose_subjects(dataset, options.subjects)
    if options.data in DEMOS:  # its simulated listener hears every story
        stories = {name: replace(s, responses=dict.fromkeys(subjects)) for name, s in dataset.stories.items()}  # type: ignore[arg-type]
        heard = replace(dataset, stories=stories)
    train, test = choose_stories(heard, subjects, options.test_stories, options.train_stories, options.seed)
    splits = split_stories(train, test, options.seed, options.outer_folds)
    n_valid = dict.fromkeys(dataset.subjects, N_VOXELS)
    if options.data not in DEMOS:
        notes = dataset.notes + _without_responses(dataset, subjects)
        used = replace(dataset.only(train + test, subjects), notes=notes)
        dataset = _select_file_voxels(options, inspect_aligned(used, train, options.trust_alignment))
        n_valid = {subject: dataset.n_valid(subject) for subject in subjects}
    for subject, n in n_valid.items():
        if options.voxels.isdecimal() and int(options.voxels) > n:
            raise InputError(f"--voxels {options.voxels}: subject {subject} has {n} that can be scored; give fewer")
    return Study(options, space, dataset, splits, base)


def general_text(options: Options) -> dict[str, str]:
    """Return hashes of the user's files of general text."""
    files = {"probe": options.probe, "control": options.control_text}
    return {name: file_hash(file) for name, file in files.items() if file}


def general_text_files(options: Options) -> tuple[Path | None, Path | None]:
    """Return the user's probe and control text; None where the bundled one is used."""
    return (
        Path(options.probe) if options.probe else None,
        Path(options.control_text) if options.control_text else None,
    )


@functools.lru_cache(maxsize=8)
def file_hash(path: str) -> str:
    """Return a hash of a file's content, computed once per process."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _select_file_voxels(options: Options, dataset: Dataset) -> Dataset:
    """Keep the voxels of a file; a number of voxels is chosen when the study runs."""
    if options.voxels == ALL or options.voxels.isdecimal():
        return dataset
    return keep_voxels(dataset, read_voxels(Path(options.voxels), dataset))


def _without_responses(dataset: Dataset, subjects: tuple[str, ...]) -> tuple[str, ...]:
    """Return notes on stories that are excluded because they have text only."""
    names = [n for n, story in dataset.stories.items() if any(s not in story.responses for s in subjects)]
    if not names:
        return ()
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    excluded = counted(len(names), "story is", "stories are")
    notes = [f"{excluded} excluded because responses of a subject are missing: {shown}"]
    if tests := [name for name in dataset.published_test if name in names]:
        notes.append(f"published test stories without responses of a subject are excluded: {', '.join(tests)}")
    return tuple(notes)


def base_config(options: Options) -> TrialConfig:
    """Return the settings that the command line fixes; the space sets the others."""
    check_layer(options.layer, options.model)
    return TrialConfig(
        model=options.model,
        layer=options.layer,
        epochs=options.epochs,
        mlm_text=options.mlm_text,
        seed=options.seed,
        embed_precision=options.embed_precision,
        score_every=options.score_every,
    )
