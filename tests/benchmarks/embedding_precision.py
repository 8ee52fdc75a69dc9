"""May word vectors be made with bfloat16 products? CC with them less CC with float32, over many splits of the stories.

python tests/benchmarks/embedding_precision.py DATA [--stories 20] [--splits 12] [--layers 4 6] [--model minilm]

One adapter is trained for an epoch on the fit stories of the first split. It and the frozen encoder read all stories in
both precisions; then each split is scored. A row a split and layer: how far CC moves, frozen and tuned, how far
tuned less frozen moves, and how many voxels chose another ridge_alpha. Then means, and their standard errors over
splits, which share stories and so are not independent.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from attention_dropout import make_task
from transformers import BertModel

from bert_encoding.datasets.splits import split_stories
from bert_encoding.language_model.finetuning_methods import prepare_model
from bert_encoding.language_model.lora import masked_lm
from bert_encoding.language_model.masked_lm import MaskedLM
from bert_encoding.language_model.training import train
from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.pipeline import Chain, Task
from bert_encoding.trial.training_data import TrainingData

PRECISIONS = ("float32", "bfloat16")
Features = dict[str, np.ndarray]  # story -> (n_trs, n_hidden)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--stories", type=int, default=20)
    parser.add_argument("--splits", type=int, default=12)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 6])
    given = parser.parse_args()
    task = make_task(given.data, given.stories)
    chain = Chain(TrialConfig(model=given.model, epochs=1), task)
    berts = {"frozen": chain.bert_encoder.model.bert, "tuned": masked_lm(tuned(chain)).bert}
    features = {
        (who, precision): read(chain, bert, given.layers, precision)
        for who, bert in berts.items()
        for precision in PRECISIONS
    }
    print("layer split  d frozen   d tuned  d paired  effect(float32)  other alphas: frozen, tuned", flush=True)
    for layer in given.layers:
        rows = []
        for seed in range(given.splits):
            result = {key: score(task, chain.config, of_layer[layer], seed) for key, of_layer in features.items()}
            rows.append(compare(result))
            print(f"{layer:5} {seed:5} " + " ".join(f"{value:+.1e}" for value in rows[-1]), flush=True)
        table = np.array(rows)
        errors = table.std(axis=0, ddof=1) / np.sqrt(len(table))
        for name, values in (("mean", table.mean(axis=0)), ("sd", table.std(axis=0, ddof=1)), ("error", errors)):
            print(f"{layer:5} {name:>5} " + " ".join(f"{value:+.1e}" for value in values), flush=True)


def tuned(chain: Chain) -> object:
    """Return the model after an epoch on the fit stories of the first split."""
    model = prepare_model(chain.config.tuning, chain.bert_encoder)
    trained, objective = TrainingData(chain, chain.task.splits[0]).objective(model)
    assert isinstance(objective, MaskedLM)
    for _ in train(trained, objective, chain.config.training, chain.config.seed, chain.device):
        pass
    return model


def read(chain: Chain, bert: BertModel, layers: list[int], precision: str) -> dict[int, Features]:
    """Return layer -> features of all training stories, and print how long that took."""
    features, split = {}, chain.task.splits[0]
    for layer in layers:
        reader = Chain(replace(chain.config, embed_precision=precision, layer=layer), chain.task, chain.cache)
        features[layer] = reader.downsampled(bert, split.fit + split.validation, split.fit)
        print(f"layer {layer} in {precision}: {reader.seconds['embed']:.1f} s", flush=True)
    return features


def score(task: Task, config: TrialConfig, features: Features, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return CC and alpha of every voxel of all subjects, with the split of this seed."""
    first = task.splits[0]
    split = split_stories(sorted(first.fit + first.validation), sorted(first.test), seed, 1)[0]
    result = Chain(config, task._replace(splits=(split,))).score(features, split.fit, split.validation)
    cc = np.concatenate([one.cc.astype(float) for one in result.values()])
    return cc, np.concatenate([one.ridge_alphas for one in result.values()])


def compare(result: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]) -> list[float]:
    """Return how far mean CC moves, frozen, tuned and their difference; that in float32; and voxels of other alphas."""
    (exact_0, alphas_0), (rough_0, rough_alphas_0) = (result["frozen", precision] for precision in PRECISIONS)
    (exact_1, alphas_1), (rough_1, rough_alphas_1) = (result["tuned", precision] for precision in PRECISIONS)
    moved = [float((rough_0 - exact_0).mean()), float((rough_1 - exact_1).mean())]
    changed = [float((alphas_0 != rough_alphas_0).sum()), float((alphas_1 != rough_alphas_1).sum())]
    return [*moved, moved[1] - moved[0], float((exact_1 - exact_0).mean()), *changed]


if __name__ == "__main__":
    main()
