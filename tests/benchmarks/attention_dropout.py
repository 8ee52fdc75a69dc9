"""Does dropout on attention probabilities matter? The same trials with it and without, over seeds.

python tests/benchmarks/attention_dropout.py DATA [--stories 20] [--epochs 3] [--seeds 3] [--model minilm]

A row a trial: masked-LM loss in training and held out, the gap between the two, CC, and seconds of training. Then the
mean difference, with minus without, and its standard error over seeds.
"""

import argparse
from pathlib import Path

import numpy as np

from bert_encoding.datasets import open_dataset
from bert_encoding.datasets.inspect import inspect
from bert_encoding.datasets.splits import choose_stories, split_stories
from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.pipeline import Task
from bert_encoding.trial.run import run_trial

RATES = (0.1, 0.0)
COLUMNS = ("mlm_loss_train", "mlm_loss_heldout", "gap", "cc_mean", "cc_seen", "train_s")


def main() -> None:
    """Run the trials one after the other and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="minilm")
    for name, default in (("stories", 20), ("epochs", 3), ("seeds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    task = make_task(arguments.data, arguments.stories)
    print("dropout seed " + " ".join(f"{name:>16}" for name in COLUMNS), flush=True)
    rows: dict[float, list[list[float]]] = {rate: [] for rate in RATES}
    for seed in range(arguments.seeds):
        for rate in RATES:
            settings = {"model": arguments.model, "epochs": arguments.epochs, "score_every": arguments.epochs}
            config = TrialConfig(**settings, seed=seed, hidden_dropout=0.1, attention_dropout=rate)
            rows[rate].append(measure(config, task))
            print(f"{rate:7} {seed:4} " + " ".join(f"{value:16.5f}" for value in rows[rate][-1]), flush=True)
    differences = np.array(rows[RATES[0]]) - np.array(rows[RATES[1]])  # (n_seeds, n_columns)
    print("with - without " + " ".join(f"{value:+.5f}" for value in differences.mean(axis=0)))
    if arguments.seeds > 1:
        errors = differences.std(axis=0, ddof=1) / np.sqrt(arguments.seeds)
        print("standard error " + " ".join(f"{value:.5f}" for value in errors))


def make_task(data: Path, n_stories: int) -> Task:
    """Return a seeded choice of training stories, divided as a study divides them."""
    dataset = open_dataset(data)
    train, test = choose_stories(dataset, dataset.subjects, None, n_stories, seed=0)
    used = inspect(dataset.only(train + test, dataset.subjects))
    return Task(used, split_stories(train, test, 0, 1), 0)


def measure(config: TrialConfig, task: Task) -> list[float]:
    """Return what ``COLUMNS`` names of one trial."""
    record = run_trial(config, task)
    result = record.scores | {"train_s": record.seconds["train"]}
    result["gap"] = result["mlm_loss_heldout"] - result["mlm_loss_train"]
    return [float(result[name]) for name in COLUMNS]


if __name__ == "__main__":
    main()
