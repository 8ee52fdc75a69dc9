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

from bert_encoding.core.devices import pick_device
from bert_encoding.core.names import FROZEN
from bert_encoding.core.zscore import ZScore
from bert_encoding.datasets import open_dataset
from bert_encoding.datasets.inspect import inspect
from bert_encoding.datasets.splits import choose_stories
from bert_encoding.features.bert_embeddings import embed_stories
from bert_encoding.features.downsampling import downsample_story
from bert_encoding.language_model.encoder import load_encoder
from bert_encoding.language_model.windows import tokenize
from bert_encoding.regression.response_panels import stack_responses
from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.scoring import make_design, prepare_ridge, score_subject

app = cyclopts.App()


@app.default
def main(data: Path, model: str = "minilm-plain", train_stories: int | None = None, seed: int = 0) -> None:
    """Print the mean test CC of both, and how their voxels differ."""
    dataset = open_dataset(data)
    train, test = choose_stories(dataset, dataset.subjects, None, train_stories, seed)
    dataset = inspect(dataset.only(train + test, dataset.subjects))
    fit, scored, subject = tuple(sorted(train)), tuple(sorted(test)), dataset.subjects[0]
    config = TrialConfig(method=FROZEN, model=model)
    encoder = load_encoder(model)
    tokens = {name: tokenize(dataset.stories[name].spoken, encoder.tokenizer) for name in fit + scored}
    vectors = embed_stories(
        encoder.model.bert,
        tokens,
        encoder.tokenizer,
        layer=encoder.n_layers,
        window_tokens=config.window_tokens,
        stride=config.embed_stride,
        precision="float32",
        device=pick_device(),
    )
    downsampled = {name: downsample_story(vectors[name], dataset.stories[name]) for name in (*fit, *scored)}
    design = make_design(downsampled, dataset, fit, scored, config, seed)
    began = time.perf_counter()
    ours = score_subject(prepare_ridge(design, config, pick_device()), design, dataset, subject, fit, scored)
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
