"""How fast this machine computes the stages of a trial: timed for some seconds on a randomly initialised BERT."""

import functools
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import BertConfig, BertForMaskedLM

from bert_encoding.core.names import LORA
from bert_encoding.features.bert_embeddings import embed_stories
from bert_encoding.language_model.encoder import Encoder
from bert_encoding.language_model.finetuning_methods import prepare_model
from bert_encoding.language_model.lora import masked_lm
from bert_encoding.language_model.masked_lm import masked_lm_loss
from bert_encoding.language_model.masking import mask_windows
from bert_encoding.language_model.windows import Tokens, cut_windows
from bert_encoding.regression.ridge import CrossValidatedRidge
from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.scoring import examine_predictions
from study.cluster.machines import machine_gpus
from study.session.memory import block_weights
from study.setup.options import Options

VOCABULARY = 30_522  # word pieces of BERT
N_LAYERS = 2  # of the probe's BERT; the time of a block does not depend on how many there are
N_WINDOWS = 2  # of a training step, and per thread for word vectors
SHORT_S = 1.0  # a run that takes less is repeated: the first one also prepares
N_FEATURES, N_VOXELS, N_FOLDS = 384, 200, 3  # of the probe's ridge
EIGH_SIZE = 768
N_TESTED_ROWS = 300
EXPECTED_RANGE = (0.5, 2.0)  # of the probed seconds: other programs, and trials that run at the same time


class Work(NamedTuple):
    """Counted operations of a job, by stage: floating-point operations, but for the tests."""

    train: float = 0.0
    embed: float = 0.0
    decompose: float = 0.0  # of ridge
    products: float = 0.0  # of ridge
    tests: float = 0.0  # values (voxels times scored rows) that are permuted and resampled


class Rates(NamedTuple):
    """Seconds per operation of each stage of ``Work``; their range, as factors; and where they are from."""

    seconds: Work
    low: float
    high: float
    source: str


def embed_flops(shape: dict[str, int]) -> float:
    """Return the operations per token of a forward pass."""
    return 2.0 * block_weights(shape)


def train_flops(shape: dict[str, int], mask_probability: float) -> float:
    """Return the operations per token of LoRA training: forward, and the gradients of the activations.

    The masked-LM head is computed at masked tokens alone.
    """
    head = shape["n_hidden"] * (shape["n_hidden"] + VOCABULARY)
    return 4.0 * (block_weights(shape) + mask_probability * head)


def decompose_flops(size: int) -> float:
    """Return the operations of one eigendecomposition."""
    return 10.0 * size**3


def product_flops(n_rows: int, size: int, n_voxels: int, n_predictions: float) -> float:
    """Return the operations of ridge's predictions of the fit rows, one for each fold and penalty."""
    return 2.0 * n_rows * size * n_voxels * n_predictions


def probe_rates(shape: dict[str, int], base: TrialConfig, options: Options) -> Rates | None:
    """Return how fast a trial would run here; None if its GPU is not on this machine.

    Only a process of its own uses a GPU: memory that the driver held there would be lost to the trials.
    """
    began = time.perf_counter()
    like_others = replace(base, model="probe", seed=0)  # which change no time
    settings = (tuple(shape.items()), like_others, max(1, int(options.cpus_per_trial)))
    share = min(options.gpus_per_trial, 1.0)
    if not share:
        seconds = _measure(*settings, "cpu")
    elif machine_gpus():
        try:
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                seconds = pool.submit(_measure, *settings, "cuda").result()
        except RuntimeError:  # too little memory is free there, or the process was ended
            return None
        seconds = Work(*(value / share for value in seconds))
    else:
        return None
    where = "this machine" if options.machines.is_local else "this machine, the cluster's others may differ"
    return Rates(seconds, *EXPECTED_RANGE, f"from a probe of {time.perf_counter() - began:.1f} s on {where}")


@functools.cache
def _measure(shape_items: tuple[tuple[str, int], ...], base: TrialConfig, n_threads: int, device_name: str) -> Work:
    """Return the seconds per operation of each stage."""
    shape, device = dict(shape_items), torch.device(device_name)
    n_threads_before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        with torch.random.fork_rng():
            return Work(*_measure_bert(shape, base, device), *_measure_ridge(shape, base, device), _measure_tests())
    finally:
        torch.set_num_threads(n_threads_before)


class _SpecialTokens:
    """What windows and masking need of a tokenizer."""

    pad_token_id, cls_token_id, sep_token_id, mask_token_id = range(4)

    def __len__(self) -> int:
        return VOCABULARY


def _measure_bert(shape: dict[str, int], base: TrialConfig, device: torch.device) -> tuple[float, float]:
    """Return the seconds per operation of a training step and of word vectors."""
    shape = shape | {"n_layers": min(N_LAYERS, shape["n_layers"])}
    tokenizer: Any = _SpecialTokens()
    rng = np.random.default_rng(0)
    encoder = Encoder("probe", tokenizer, _random_bert(shape, base), has_head=True)
    model = prepare_model(replace(base, method=LORA, layer=None, lora_layers=None).tuning, encoder).to(device)

    def story(n_windows: int, n_inner: int, stride: int) -> Tokens:
        n_tokens = n_inner + (n_windows - 1) * stride
        return Tokens(rng.integers(4, VOCABULARY, n_tokens), np.arange(n_tokens), n_tokens)

    tokens = story(N_WINDOWS, base.window_tokens - 2, base.stride)
    windows = cut_windows(tokens, base.window_tokens, base.stride, tokenizer)
    batch = mask_windows(windows, base.mask_probability, rng, tokenizer)

    def train() -> None:
        masked_lm_loss(masked_lm(model), batch, base.precision, device, "sum").backward()  # type: ignore[no-untyped-call]

    n_read = N_WINDOWS * torch.get_num_threads()
    read = {"story": story(n_read, base.embed_window_tokens - 2, base.embed_stride)}

    def embed() -> None:
        embed_stories(
            masked_lm(model).bert, read, tokenizer, layer=shape["n_layers"], window_tokens=base.embed_window_tokens,
            stride=base.embed_stride, precision=base.embed_precision, device=device,
        )  # fmt: skip

    model.train()
    train_s, embed_s = _seconds(train, device), _seconds(embed, device)
    per_training_token = train_s / (len(windows) * base.window_tokens)
    per_embedded_token = embed_s / (n_read * base.embed_window_tokens)
    return per_training_token / train_flops(shape, base.mask_probability), per_embedded_token / embed_flops(shape)


def _random_bert(shape: dict[str, int], base: TrialConfig) -> BertForMaskedLM:
    n_hidden = shape["n_hidden"]
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=n_hidden,
        num_hidden_layers=shape["n_layers"],
        num_attention_heads=next(n for n in range(max(1, n_hidden // 64), 0, -1) if n_hidden % n == 0),
        intermediate_size=shape["n_intermediate"],
        max_position_embeddings=max(base.window_tokens, base.embed_window_tokens),
    )
    return BertForMaskedLM(config)


def _measure_ridge(shape: dict[str, int], base: TrialConfig, device: torch.device) -> tuple[float, float]:
    """Return the seconds per operation of a decomposition, and of the products of a nested cross-validation."""
    rng = np.random.default_rng(0)
    n_features = shape["n_hidden"] * len(base.delays)
    size = min(n_features, EIGH_SIZE)
    factor = torch.from_numpy(rng.standard_normal((size, 2 * size), dtype=np.float32)).to(device)
    gram = factor @ factor.T
    decompose_s = _seconds(lambda: torch.linalg.eigh(gram), device)
    size = min(n_features, N_FEATURES)
    X, Y = (rng.standard_normal((2 * size, n), dtype=np.float32) for n in (size, N_VOXELS))
    ridge = CrossValidatedRidge(X, np.arange(len(X)) % N_FOLDS, base.ridge_alphas, device=device)

    def fit() -> None:
        ridge.fit(Y)
        ridge.predict_left_out(Y)

    fit()  # decomposes, which later calls need not
    n_predictions = len(base.ridge_alphas) + 2 + (N_FOLDS - 1) * len(base.ridge_alphas)
    products = product_flops(len(X), size, N_VOXELS, n_predictions)
    return decompose_s / decompose_flops(len(gram)), _seconds(fit, device) / products


def _measure_tests() -> float:
    """Return the seconds per voxel and scored row of permutations and resamples."""
    Y, predicted = np.random.default_rng(0).standard_normal((2, N_TESTED_ROWS, N_VOXELS), dtype=np.float32)
    rows = np.zeros(N_TESTED_ROWS, int)
    return _seconds(lambda: examine_predictions(Y, predicted, rows), torch.device("cpu")) / Y.size


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return how long it takes; a short run is repeated and the shorter of the two counts.

    On a CPU these are processor seconds per thread, which other programs on the machine lengthen little.
    """
    runs: list[float] = []
    while not runs or (len(runs) < 2 and runs[0] < SHORT_S):
        began = _clock(device)
        work()
        runs.append(_clock(device) - began)
    return min(runs)


def _clock(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time() / torch.get_num_threads()
    torch.cuda.synchronize(device)
    return time.perf_counter()
