"""Test CC of frozen word vectors: our chain compared with himalaya's RidgeCV, with equal features, folds and alphas.

python tests/benchmarks/compare_himalaya.py --data PATH [--model minilm-plain] [--train-stories N]
"""

import time
from pathlib import Path

import cyclopts
import numpy as np
from himalaya.ridge import RidgeCV
from himalaya.scoring import correlation_score
from sklearn.model_selection import PredefinedSplit

from bert_encoding.core.names import FROZEN
from bert_encoding.core.zscore import ZScore
from bert_encoding.datasets import open_dataset
from bert_encoding.datasets.inspect import inspect
from bert_encoding.datasets.splits import choose_stories
from bert_encoding.regression.response_panels import stack_responses
from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.pipeline import Chain, Task
from bert_encoding.trial.scoring import make_design, prepare_ridge, score_subject

app = cyclopts.App()


@app.default
def main(data: Path, model: str = "minilm-plain", train_stories: int | None = None, seed: int = 0) -> None:
    """Print the mean test CC of both, and how their voxels differ."""
    dataset = open_dataset(data)
    train, test = choose_stories(dataset, dataset.subjects, None, train_stories, seed)
    dataset = inspect(dataset.only(train + test, dataset.subjects))
    fit, scored, subject = tuple(sorted(train)), tuple(sorted(test)), dataset.subjects[0]
    config = TrialConfig(method=FROZEN, model=model, embed_precision="float32")
    chain = Chain(config, Task(dataset, (), seed))
    downsampled = chain.downsampled(chain.bert_encoder.model.bert, fit + scored, fit)
    design = make_design(downsampled, dataset, fit, scored, config, seed)
    began = time.perf_counter()
    ours = score_subject(prepare_ridge(design, config, chain.device), design, dataset, subject, fit, scored)
    print(f"ours      mean test CC {ours.cc.mean():.5f}  {time.perf_counter() - began:.0f} s")
    Y = stack_responses(dataset, subject, fit)
    began = time.perf_counter()
    solver = {"score_func": correlation_score, "local_alpha": True, "n_targets_batch": 1000, "n_alphas_batch": 1}
    theirs = RidgeCV(alphas=np.array(config.ridge_alphas), cv=PredefinedSplit(design.folds), solver_params=solver).fit(
        design.fit.astype(np.float64), ZScore.learn(Y).apply(Y).astype(np.float64)
    )
    Y_scored = stack_responses(dataset, subject, scored)
    cc = correlation_score(Y_scored.astype(np.float64), theirs.predict(design.scored.astype(np.float64)))
    print(f"himalaya  mean test CC {cc.mean():.5f}  {time.perf_counter() - began:.0f} s")
    print(f"largest difference of a voxel {np.abs(cc - ours.cc).max():.2e}; rows {design.fit.shape}, voxels {cc.size}")
    print(f"same alpha in {np.mean(np.isclose(theirs.best_alphas_, ours.ridge_alphas)):.1%} of voxels")


if __name__ == "__main__":
    app()
