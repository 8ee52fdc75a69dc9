"""Text-only studies: a corpus instead of stories and responses."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from bert_encoding.core.command_line import print_lines
from bert_encoding.core.errors import InputError
from bert_encoding.core.files import content_key
from bert_encoding.core.names import ADAPT, DEMOS
from bert_encoding.datasets.corpus import describe, open_corpus
from bert_encoding.language_model.encoder import MINILM_PLAIN, check_model_name
from bert_encoding.text_tasks.task import TextTask, make_text_task
from bert_encoding.trial.config import TrialConfig
from study.setup.encoding_study import Study, base_config, general_text, general_text_files
from study.setup.options import Options
from study.setup.resolve import check_task
from study.setup.spaces import Space, rehearse


@dataclass(frozen=True)
class TextStudy:
    """A study on text before it runs."""

    options: Options
    space: Space
    base: TrialConfig
    text_task: TextTask

    def task(self) -> TextTask:
        """Return the input that all trials share."""
        return self.text_task

    def about(self, task: TextTask) -> dict[str, Any]:
        """Return the entries of ``study.json`` on the corpus and its split."""
        corpus, parts = task.corpus, {"training": task.train, "held-out": task.heldout}
        split = {role: [f"{len(places)} texts ({content_key(places.tolist())})"] for role, places in parts.items()}
        return {
            "data": {
                "source": str(corpus.path),
                "fingerprint": corpus.fingerprint,
                "n_texts": corpus.n_texts,
                "classes": dict(corpus.counts),
                "max_length": task.max_length,
                "notes": list(corpus.notes),
            },
            "voxels": {"asked": "none", "key": task.max_length},
            "splits": [split],
            "general_text": general_text(self.options),
        }


AnyStudy = Study | TextStudy


def prepare_text(options: Options, space: Space) -> TextStudy:
    """Open the corpus, split its texts, and check every setting that can be checked without a model."""
    check_task(options, is_text=True)
    check_model_name(options.model)
    if space.task == ADAPT and options.model == MINILM_PLAIN:
        raise InputError(f"--model {MINILM_PLAIN}: has no masked-LM head to adapt; use minilm")
    base = base_config(options)
    rehearse(space, base)
    if options.data in DEMOS:
        raise InputError("--data: a space of this task needs text; give a .txt, .csv or .parquet file, or a folder")
    corpus = open_corpus(Path(options.data), clean=options.clean, n_examples=options.examples, seed=options.seed)
    task = make_text_task(
        space.task, corpus, options.seed, n_train=options.train_examples, max_length=options.max_length
    )
    probe, control = general_text_files(options)
    return TextStudy(options, space, base, task._replace(probe_text=probe, control_text=control))


def print_text_plan(console: Console, study: TextStudy, n_done: int) -> None:
    """Print corpus, classes, split and trials."""
    options, task = study.options, study.text_task
    print_lines(
        console,
        f"study: {options.name} -> {options.folder}",
        f"question: {study.space.question} ({study.space.name})",
        *describe(task.corpus),
        f"texts: {len(task.train)} to train on, {len(task.heldout)} held out",
        f"model: {options.model}; at most {task.max_length or study.base.window_tokens} tokens of a text",
        f"trials: 1 baseline, {options.trials} searched" + (f", {n_done} of them done" if n_done else ""),
        f"search: sampler {options.sampler}, scheduler {options.scheduler}",
        f"workers: up to {options.max_concurrent} at once",
    )
