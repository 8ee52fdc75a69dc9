"""A trial's features and scores in plain loops, scikit-learn and transformers: an independent reference."""

import math

import numpy as np
import torch
from sklearn.linear_model import Ridge
from transformers import BertModel

from bert_encoding.language_model.encoder import Encoder
from bert_encoding.trial.pipeline import Task

SUBJECT = "subject2"


def plain_word_vectors(
    words: tuple[str, ...], bert: BertModel | None, encoder: Encoder, layer: int, window_tokens: int, stride: int
) -> np.ndarray:
    """Word vectors of a story whose words are one token each, window after window; or the word rate."""
    spoken = [index for index, word in enumerate(words) if word.isalpha()]
    if bert is None:
        return np.array([[float(index in spoken)] for index in range(len(words))])
    sums, counts = np.zeros((len(words), bert.config.hidden_size)), np.zeros(len(words))
    start, n_inner = 0, window_tokens - 2
    while True:
        inside = spoken[start : start + n_inner]
        ids = encoder.tokenizer.convert_tokens_to_ids(["[CLS]", *(words[index] for index in inside), "[SEP]"])
        assert encoder.tokenizer.unk_token_id not in ids
        with torch.no_grad():
            hidden = bert(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer][0, 1:-1]
        sums[inside] += hidden.numpy()
        counts[inside] += 1
        if start + n_inner >= len(spoken):
            return sums / np.maximum(counts, 1)[:, None]
        start += stride


def plain_features(vectors: np.ndarray, word_times: np.ndarray, tr_times: np.ndarray) -> np.ndarray:
    """Lanczos with 3 lobes, then delays of 1 to 4 TRs, then rows [10:-5]; one number at a time."""
    cutoff = 1 / ((tr_times[-1] - tr_times[0]) / (len(tr_times) - 1))
    downsampled = np.zeros((len(tr_times), vectors.shape[1]))
    for t, tr_time in enumerate(tr_times):
        for w, word_time in enumerate(word_times):
            x = (tr_time - word_time) * cutoff
            if abs(x) <= 3:
                weight = 3 * math.sin(math.pi * x) * math.sin(math.pi * x / 3) / (math.pi * x) ** 2 if x else 1.0
                downsampled[t] += weight * vectors[w]
    zeros = np.zeros(vectors.shape[1])
    delayed = [
        np.concatenate([downsampled[t - d] if t >= d else zeros for d in (1, 2, 3, 4)]) for t in range(len(tr_times))
    ]
    return np.array(delayed[10:-5])


def plain_cc(X: np.ndarray, Y: np.ndarray, X_scored: np.ndarray, Y_scored: np.ndarray, alpha: float) -> np.ndarray:
    """Z-score by the fit rows, fit scikit-learn's ridge, and correlate."""
    X_scored, X = (X_scored - X.mean(0)) / X.std(0), (X - X.mean(0)) / X.std(0)
    ridge = Ridge(alpha=alpha, fit_intercept=False).fit(X, (Y - Y.mean(0)) / Y.std(0))
    predicted = ridge.predict(X_scored)
    return np.array([np.corrcoef(Y_scored[:, v], predicted[:, v])[0, 1] for v in range(Y.shape[1])])


class PlainChain:
    """Features and responses of all stories; of our package only the readers of files are used."""

    def __init__(
        self, task: Task, bert: BertModel | None, encoder: Encoder, layer: int, window_tokens: int, stride: int
    ) -> None:
        self.X, self.Y = {}, {}
        for name, story in task.dataset.stories.items():
            vectors = plain_word_vectors(story.words, bert, encoder, layer, window_tokens, stride)
            self.X[name] = plain_features(vectors, story.word_times_s, story.tr_times_s)
            self.Y[name] = np.load(story.responses[SUBJECT].path)

    def cc(self, fit: tuple[str, ...], scored: tuple[str, ...], alpha: float, voxels: np.ndarray) -> np.ndarray:
        X, Y = (np.vstack([part[name] for name in fit]) for part in (self.X, self.Y))
        X_scored, Y_scored = (np.vstack([part[name] for name in scored]) for part in (self.X, self.Y))
        return plain_cc(X, Y[:, voxels], X_scored, Y_scored[:, voxels], alpha)

    def cc_seen(self, fit: tuple[str, ...], alpha: float, voxels: np.ndarray) -> np.ndarray:
        """Predict each fit story from the others."""
        X = np.vstack([self.X[name] for name in fit])
        Y = np.vstack([self.Y[name] for name in fit])[:, voxels]
        X, Y = (X - X.mean(0)) / X.std(0), (Y - Y.mean(0)) / Y.std(0)
        of_row = np.concatenate([[name] * len(self.X[name]) for name in fit])
        predicted = np.zeros_like(Y)
        for name in fit:
            out = of_row == name
            predicted[out] = Ridge(alpha=alpha, fit_intercept=False).fit(X[~out], Y[~out]).predict(X[out])
        return np.array([np.corrcoef(Y[:, v], predicted[:, v])[0, 1] for v in range(Y.shape[1])])
