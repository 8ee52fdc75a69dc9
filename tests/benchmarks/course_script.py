"""The script that a student of the course would write; the library is measured against it.

python tests/benchmarks/course_script.py DATA --model minilm --train-stories 20 --rank 8 --lr 2e-4 --seed 0 --out FILE

One configuration per process: transformers and PEFT in float32, ``BertForMaskedLM`` called with labels (so it computes
logits at every position), the stock collator, the model's own dropouts; one forward pass per window for embeddings; the
Huth lab's code (``ridge_utils``) for Lanczos, delays and ridge, with folds of whole stories; one score, at the end.

It shares with the library what does not decide speed: how data and checkpoint are loaded,
which stories and voxels, the ridge folds, and the masked probes on which the held-out loss is read. Features are
delayed in the whole story, then trimmed, then z-scored by the fit rows. All arithmetic is the script's own. It is given
float32 features and responses, which the lab's code takes and is faster with, and torch's own number of threads.

Two laps belong to the comparison, not to the script, and are left out of its seconds: ``inspect``, the library's checks
of the data (a student loads them), and ``probes``, the reading of the held-out loss.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from compare_ridge import peak_gb
from peft import LoraConfig, get_peft_model
from ridge_utils.interpdata import lanczosinterp2D
from ridge_utils.ridge import ridge, ridge_corr
from ridge_utils.util import make_delayed
from torch.utils.data import DataLoader
from transformers import DataCollatorForLanguageModeling, get_scheduler

from bert_encoding.core.devices import pick_device
from bert_encoding.core.names import DEMOS
from bert_encoding.datasets.inspect import inspect
from bert_encoding.datasets.splits import Split, choose_stories, choose_subjects, split_stories, story_folds
from bert_encoding.datasets.story import Dataset, Story
from bert_encoding.demo import open_data
from bert_encoding.language_model.encoder import Encoder, load_encoder, quiet
from bert_encoding.language_model.masked_lm import Probes, make_probes
from bert_encoding.language_model.windows import tokenize, training_windows
from bert_encoding.trial.config import TrialConfig

SPLIT_SEED = 0  # of the choice of stories and of the ridge folds, the same for all configurations
IGNORED = -100  # the label of a position that is not to be predicted
MIN_TOKENS = 32  # of a training window

Words = dict[str, np.ndarray]  # story -> an array with one row per word, or per TR


def main() -> None:
    """Run one configuration and write its seconds and scores."""
    began, arguments = psutil.Process().create_time(), argument_parser(__doc__).parse_args()
    seconds = {"start": time.time() - began}
    result = run(arguments)
    result["seconds"] = seconds | result["seconds"] | {"total": time.time() - began}
    write_result(result, arguments.out)


def write_result(result: dict[str, Any], file: Path | None) -> None:
    """Print a result, with threads, device and peak memory of this process in GB (on a GPU also of its tensors)."""
    peaks = {"memory": peak_gb()}
    if torch.cuda.is_available():
        peaks["gpu"] = torch.cuda.max_memory_allocated() / 1e9
    where = {"n_threads": torch.get_num_threads(), "device": pick_device().type, "peak_gb": peaks}
    text = json.dumps(result | where, indent=1)
    print(text)
    if file is not None:
        file.write_text(text + "\n")


def argument_parser(text: str | None) -> argparse.ArgumentParser:
    """Return the options; ``--max-steps`` and ``--embed-stories`` cut a measurement short that is extrapolated."""
    parser = argparse.ArgumentParser(description=(text or "").split("\n")[0])
    parser.add_argument("data", help="'demo', or the folder of the data")
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--train-stories", type=int, help="fit and validation together; default: all")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--max-steps", type=int, help="stop training after this many steps")
    parser.add_argument("--embed-stories", type=int, help="embed only this many stories; the others get random vectors")
    parser.add_argument("--out", type=Path, help="JSON file")
    return parser


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fine-tune, embed, fit ridge and score; return seconds and counts per stage, and the scores."""
    clock = Clock()
    opened, split = open_and_split(arguments.data, arguments.train_stories)
    encoder = load_encoder(arguments.model)
    device = pick_device()
    setting = TrialConfig(**chosen_settings(arguments), attention_dropout=None)
    clock.lap("load")
    dataset = inspected(opened)
    clock.lap("inspect")
    stories = tokenize_all(dataset, split, encoder)
    model, loader = prepare(encoder, [stories[name] for name in split.fit], setting, device)
    clock.lap("prepare")
    trained = train(model, loader, setting, device, arguments.max_steps)
    clock.lap("train")
    first = dict(list(stories.items())[: arguments.embed_stories])
    vectors, n_embedded = embed_all(model.get_base_model().bert, encoder, dataset, first, setting)
    clock.lap("embed")
    vectors |= draw_all(encoder, dataset, [name for name in stories if name not in first])
    clock.lap("drawn")
    cc = {subject: encode(vectors, dataset, subject, split, setting) for subject in dataset.subjects}
    clock.lap("ridge")
    probes = draw_probes(encoder, dataset, split, setting)
    loss = heldout_loss(model, probes, device)
    clock.lap("probes")
    n_words = sum(len(dataset.stories[name].words) for name in stories)
    return {
        "seconds": clock.seconds,
        "counts": trained | {"words": n_embedded, "words_whole": n_words, "n_voxels": sum(map(len, cc.values()))},
        "scores": {"cc_mean": float(np.mean([np.mean(one) for one in cc.values()])), "mlm_loss_heldout": loss},
        "probes": digest(probes),
        "precision": {"train": "float32", "embed": "float32"},
        "dropout": dropout_of(model.config),
    }


def chosen_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of a trial that the command line chooses."""
    return {name: getattr(arguments, name) for name in ("model", "rank", "lr", "seed", "epochs")}


def dropout_of(config: Any) -> dict[str, float]:
    """Return the probabilities of dropout of a checkpoint."""
    return {"attention": config.attention_probs_dropout_prob, "hidden": config.hidden_dropout_prob}


class Clock:
    """Seconds from one lap to the next."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._began = time.perf_counter()

    def lap(self, name: str) -> None:
        """Give the time since the last lap a name."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[name], self._began = now - self._began, now


def open_and_split(path: str, n_train_stories: int | None) -> tuple[Dataset, Split]:
    """Open the data and divide the stories as a study does."""
    dataset = open_data(path)
    subjects = choose_subjects(dataset, None)
    train, test = choose_stories(dataset, subjects, None, n_train_stories, SPLIT_SEED)
    split = split_stories(train, test, SPLIT_SEED, 1)[0]
    return (dataset if path in DEMOS else dataset.only(train + test, subjects)), split


def inspected(dataset: Dataset) -> Dataset:
    """Let the library check the data and choose the voxels; the simulated listener has been through it."""
    return inspect(dataset) if dataset.voxel_masks is None else dataset


class Tokenized(NamedTuple):
    """A story: token ids, and the word of each token."""

    ids: list[int]
    word_ids: list[int]


def tokenize_story(spoken: tuple[str, ...], tokenizer: Any) -> Tokenized:
    """Cut words into word pieces."""
    encoded = tokenizer(list(spoken), is_split_into_words=True, add_special_tokens=False, verbose=False)
    return Tokenized(encoded["input_ids"], encoded.word_ids())


def tokenize_all(dataset: Dataset, split: Split, encoder: Encoder) -> dict[str, Tokenized]:
    """Cut the words of all fit and validation stories into word pieces, once."""
    names = split.fit + split.validation
    return {name: tokenize_story(dataset.stories[name].spoken, encoder.tokenizer) for name in names}


def cut_windows(story: Tokenized, window_tokens: int, stride: int, tokenizer: Any) -> list[Tokenized]:
    """Cut a story into overlapping windows from [CLS] to [SEP]; their word ids leave these two out."""
    n_inner, windows, start = window_tokens - 2, [], 0
    while True:
        piece = story.ids[start : start + n_inner]
        ids = [tokenizer.cls_token_id, *piece, tokenizer.sep_token_id]
        windows.append(Tokenized(ids, story.word_ids[start : start + n_inner]))
        if start + n_inner >= len(story.ids):
            return windows
        start += stride


def prepare(
    encoder: Encoder, stories: list[Tokenized], setting: TrialConfig, device: torch.device
) -> tuple[Any, DataLoader[Any]]:
    """Return a model with an adapter, and the training windows of some stories."""
    torch.manual_seed(setting.seed)
    tokenizer = encoder.tokenizer
    adapter = LoraConfig(
        r=setting.rank,
        lora_alpha=setting.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=setting.lora_dropout,
        target_modules=["query", "value"],
    )
    with quiet():
        model = get_peft_model(encoder.copy_model(), adapter).to(device)
    windows = [w for s in stories for w in cut_windows(s, setting.window_tokens, setting.stride, tokenizer)]
    examples = [{"input_ids": window.ids} for window in windows if len(window.ids) >= MIN_TOKENS]
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=setting.mask_probability)
    loader = DataLoader(examples, batch_size=setting.batch_size, shuffle=True, collate_fn=collator)  # type: ignore[arg-type]
    return model, loader


def train(
    model: Any, loader: DataLoader[Any], setting: TrialConfig, device: torch.device, max_steps: int | None
) -> dict[str, float]:
    """Run the training loop; return steps, tokens without padding, and positions, which are tokens with padding."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=setting.lr, weight_decay=setting.weight_decay)
    n_warmup, n_steps = round(setting.warmup_epochs * len(loader)), setting.epochs * len(loader)
    scheduler = get_scheduler("constant_with_warmup", optimizer, n_warmup, n_steps)
    counts = {"steps": 0, "steps_whole": n_steps, "tokens": 0, "positions": 0}
    counts["tokens_whole"] = setting.epochs * sum(len(example["input_ids"]) for example in loader.dataset)
    model.train()
    for _ in range(setting.epochs):
        for batch in loader:
            batch = batch.to(device)
            loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable, setting.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            counts["steps"] += 1
            counts["tokens"] += int(batch["attention_mask"].sum())
            counts["positions"] += batch["input_ids"].numel()
            if counts["steps"] == max_steps:
                return counts
    return counts


def embed_all(
    bert: Any, encoder: Encoder, dataset: Dataset, stories: dict[str, Tokenized], setting: TrialConfig
) -> tuple[Words, int]:
    """Return the features on the scanner's clock, story -> (n_trs, n_hidden), and how many words were embedded."""
    n_embedded, features = 0, {}
    for name, tokenized in stories.items():
        vectors = embed_story(bert, tokenized, len(dataset.stories[name].words), encoder.tokenizer, setting)
        n_embedded += len(vectors)
        features[name] = to_trs(vectors, dataset.stories[name])
    return features, n_embedded


def draw_all(encoder: Encoder, dataset: Dataset, names: Sequence[str]) -> Words:
    """Return what ``embed_all`` does, of random word vectors: for stories that are not embedded."""
    rng = np.random.default_rng(0)
    stories = [dataset.stories[name] for name in names]
    return {
        story.name: to_trs(rng.standard_normal((len(story.words), encoder.n_hidden), dtype=np.float32), story)
        for story in stories
    }


def to_trs(vectors: np.ndarray, story: Story) -> np.ndarray:
    """Return word vectors on the scanner's clock, (n_trs, n_hidden)."""
    with np.errstate(invalid="ignore"):  # ridge_utils divides 0 by 0 at a word exactly at a TR, then mends it
        return np.asarray(lanczosinterp2D(vectors, story.word_times_s, story.tr_times_s, window=3))


def embed_story(bert: Any, story: Tokenized, n_words: int, tokenizer: Any, setting: TrialConfig) -> np.ndarray:
    """Return word vectors, (n_words, n_hidden): means over a word's tokens in a window, then over windows."""
    bert.eval()
    device = next(bert.parameters()).device
    sums = np.zeros((n_words, bert.config.hidden_size))
    counts = np.zeros(n_words)
    for window in cut_windows(story, setting.embed_window_tokens, setting.embed_stride, tokenizer):
        with torch.no_grad():
            hidden = bert(torch.tensor([window.ids], device=device)).last_hidden_state[0, 1:-1].cpu().numpy()
        positions: dict[int, list[int]] = {}
        for position, word in enumerate(window.word_ids):
            positions.setdefault(word, []).append(position)
        for word, its_tokens in positions.items():
            sums[word] += hidden[its_tokens].mean(axis=0)
            counts[word] += 1
    return (sums / np.maximum(counts, 1)[:, None]).astype(np.float32)


def encode(on_trs: Words, dataset: Dataset, subject: str, split: Split, setting: TrialConfig) -> np.ndarray:
    """Fit ridge on the fit stories and return the CC of each voxel on the validation stories, (n_voxels,)."""
    start, end = dataset.trim
    X = {name: make_delayed(rows, setting.delays)[start:-end] for name, rows in on_trs.items()}
    Y = {name: dataset.valid_responses(name, subject) for name in on_trs}
    X_fit, X_validation = (np.vstack([X[name] for name in names]) for names in (split.fit, split.validation))
    Y_fit, Y_validation = (np.vstack([Y[name] for name in names]) for names in (split.fit, split.validation))
    mean, std = X_fit.mean(axis=0), X_fit.std(axis=0)
    std[std == 0] = 1
    X_fit, X_validation = (((rows - mean) / std).astype(np.float32) for rows in (X_fit, X_validation))
    Y_fit = (Y_fit - Y_fit.mean(axis=0)) / Y_fit.std(axis=0)
    folds = story_folds({name: len(X[name]) for name in split.fit}, setting.n_folds, SPLIT_SEED)
    fold_of_row = [fold for name in split.fit for fold, names in enumerate(folds) if name in names for _ in X[name]]
    weights = fit_ridge(X_fit, Y_fit, np.array(fold_of_row), setting.ridge_alphas)
    return correlate(Y_validation, X_validation @ weights)


def fit_ridge(X: np.ndarray, Y: np.ndarray, folds: np.ndarray, ridge_alphas: tuple[float, ...]) -> np.ndarray:
    """Return ridge weights, (n_features, n_voxels), with the penalty of each voxel chosen by the mean CC over folds.

    The lab's code penalises by the square of its alpha.
    """
    roots = np.sqrt(ridge_alphas).astype(np.float32)
    cc = np.zeros((len(roots), Y.shape[1]))
    for fold in np.unique(folds):
        out = folds == fold
        with np.errstate(invalid="ignore", divide="ignore"):  # of a constant prediction, which it then scores 0
            cc += ridge_corr(X[~out], X[out], Y[~out], Y[out], roots, use_corr=True)
    weights: np.ndarray = ridge(X, Y, roots[cc.argmax(axis=0)])
    return weights


def correlate(Y: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return Pearson's correlation of each column; 0 where a prediction is constant."""
    y, p = Y - Y.mean(axis=0), predicted - predicted.mean(axis=0)
    norms = np.linalg.norm(y, axis=0) * np.linalg.norm(p, axis=0)
    return np.divide((y * p).sum(axis=0), norms, out=np.zeros(y.shape[1]), where=norms > 0)


def draw_probes(encoder: Encoder, dataset: Dataset, split: Split, setting: TrialConfig) -> Probes:
    """Return the masked tokens on which the library reads the loss of a trial."""
    length, tokenizer = setting.embed_window_tokens, encoder.tokenizer
    windows = (
        training_windows([tokenize(dataset.stories[n].spoken, tokenizer) for n in names], length, length - 2, tokenizer)
        for names in (split.fit, split.validation)
    )
    return make_probes(*windows, tokenizer, setting.probe_tokens, SPLIT_SEED)


def heldout_loss(model: Any, probes: Probes, device: torch.device) -> float:
    """Return the masked-LM loss on the masked tokens of validation stories, nats per token.

    This belongs to the comparison, not to the script, and is no part of any stage.
    """
    model.eval()
    total, n = 0.0, 0
    for batch in probes.heldout:
        labels = np.full(batch.ids.shape, IGNORED)
        labels[batch.chosen] = batch.labels
        ids, attention, wanted = (torch.from_numpy(a).to(device) for a in (batch.ids, batch.attention, labels))
        with torch.no_grad():
            mean = model(input_ids=ids, attention_mask=attention, labels=wanted).loss
        total, n = total + float(mean) * batch.labels.size, n + batch.labels.size
    return total / n


def digest(probes: Probes) -> str:
    """Return a hash of the masked tokens on which the held-out loss is read; both sides must have the same."""
    sha = hashlib.sha256()
    for batch in probes.heldout:
        for array in (batch.ids, batch.chosen, batch.labels):
            sha.update(array.astype(np.int64).tobytes())
    return sha.hexdigest()[:16]


if __name__ == "__main__":
    main()
