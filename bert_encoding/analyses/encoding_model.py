"""A fitted encoding model: from a trial's settings to ridge weights on disk, and from a new story to predictions."""

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bert_encoding.analyses.model_file import (
    SUFFIX,
    EncodingModel,
    FittedSubject,
    ModelSettings,
    adapter_path,
    is_plain_name,
    write_model,
)
from bert_encoding.core.command_line import check_absent, check_ending, check_folder
from bert_encoding.core.errors import InputError
from bert_encoding.core.names import FROZEN, LORA
from bert_encoding.datasets.story import Dataset, Story
from bert_encoding.features.downsampling import story_features
from bert_encoding.features.word_tables import export_stories
from bert_encoding.language_model.encoder import checkpoint_fingerprint, load_encoder
from bert_encoding.language_model.lora import load_adapter
from bert_encoding.regression.response_panels import panels
from bert_encoding.regression.ridge import CrossValidatedRidge, RidgeFit, share_beyond_grid
from bert_encoding.trial.pipeline import Chain
from bert_encoding.trial.scoring import make_design, prepare_ridge

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
MAX_TR_ERROR = 0.01  # share of a TR; published pipelines count 2.0 s where the scanner took 2.0045
SPARE_BYTES = 2**20  # for the rest of a model file


class Origin(NamedTuple):
    """Names of the study and trial of a model, and the trial's validation CC, subject -> (n_all,)."""

    study: str
    trial_id: str
    cc: Mapping[str, np.ndarray]


def fit_encoding_model(
    chain: Chain,
    stories: Sequence[str],
    file: Path,
    *,
    adapter: Path | None,
    origin: Origin,
    log: Callable[[str], None] = lambda line: None,
) -> None:
    """Fit ridge on some stories, for every subject of the chain's data set, and write ``file`` (``model.npz``) and a
    copy of the adapter (``model/adapter``).

    Features and responses are z-scored over all rows of the stories, so predictions are in standard deviations of the
    responses. Only one panel of voxels is in memory at a time. The chain is that of a trial with method ``frozen``, or
    ``lora`` with its ``adapter``; ``log`` receives a line when a subject is done.

    Raises InputError if the files exist, the adapter does not fit or changes nothing, or the disk is full.
    """
    config, dataset, encoder = chain.config, chain.task.dataset, chain.encoder
    assert encoder is not None and config.method == (FROZEN if adapter is None else LORA)
    check_model_file(file)
    names = tuple(sorted(stories))
    settings = _settings(chain, names, adapter, origin)
    bert = encoder.copy_model().bert if adapter is None else load_adapter(encoder, adapter)
    downsampled = chain.downsampled(bert, names, names)
    design = make_design(downsampled, dataset, names, names[:1], config, chain.task.split_seed)
    _check_disk(file, sum(4 * design.fit.shape[1] * dataset.n_valid(subject) for subject in dataset.subjects))
    ridge = prepare_ridge(design, config, chain.device)
    subjects = {s: _fitted(ridge, dataset, s, names, origin.cc.get(s), log) for s in dataset.subjects}
    with _adapter_copied(adapter, file):
        write_model(file, settings, design.constants, subjects)


def _settings(chain: Chain, stories: tuple[str, ...], adapter: Path | None, origin: Origin) -> ModelSettings:
    config, dataset = chain.config, chain.task.dataset
    for name in dataset.subjects:
        if not is_plain_name(name):
            raise InputError(f"{dataset.source}: subject {name!r:.80}: it cannot be part of a file name")
    tr_s, first_tr_s = _clock([dataset.stories[name] for name in stories])
    return ModelSettings(
        encoder=config.model,
        checkpoint=checkpoint_fingerprint(config.model),
        adapter=None if adapter is None else adapter_hash(adapter),
        layer=chain.layer,
        window_tokens=config.embed_window_tokens,
        stride=config.embed_stride,
        delays=tuple(config.delays),
        trim_trs=dataset.trim,
        tr_s=tr_s,
        first_tr_s=first_tr_s,
        fit_stories=stories,
        test_stories=tuple(sorted({name for split in chain.task.splits for name in split.test} - set(stories))),
        fingerprint=dataset.fingerprint,
        study=origin.study,
        trial_id=origin.trial_id,
    )


def check_model_file(file: Path) -> None:
    """Refuse an output file that exists, has another ending than ``.npz``, or is in no folder."""
    check_ending(file, (SUFFIX,))
    check_folder(file)
    check_absent(file, adapter_path(file))


def _fitted(
    ridge: CrossValidatedRidge,
    dataset: Dataset,
    subject: str,
    stories: Sequence[str],
    cc: np.ndarray | None,
    log: Callable[[str], None],
) -> FittedSubject:
    assert dataset.voxel_masks is not None
    mask = dataset.voxel_masks[subject]
    if cc is not None and cc.shape != mask.shape:
        raise InputError(f"subject {subject}: CC of {cc.size} voxels on record, {mask.size} in the data")

    def blocks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for fit in _fit_panels(ridge, dataset, subject, stories, log):
            yield fit.weights, fit.ridge_alphas
        log(f"{subject}: {dataset.n_valid(subject)} voxels fitted on {ridge.n_rows} rows of {len(stories)} stories")

    known = np.full(mask.size, np.nan, np.float32) if cc is None else cc
    return FittedSubject(mask.size, np.flatnonzero(mask), known[mask], blocks())


def _fit_panels(
    ridge: CrossValidatedRidge, dataset: Dataset, subject: str, stories: Sequence[str], log: Callable[[str], None]
) -> Iterator[RidgeFit]:
    """Yield the fit of each panel of voxels, all from one grid of alphas, widened where ``score_subject`` would.

    All voxels have a say in that before any weight is yielded: several panels, whose weights are not held, are fitted
    twice.
    """
    n_rows = ridge.n_rows + ridge.n_features  # of responses and of weights
    parts = list(panels(dataset, subject, stories, (), n_rows))
    fit = ridge.fit(parts[0].targets(ridge)) if len(parts) == 1 else None
    cv_cc = [fit.cv_cc] if fit is not None else [ridge.fit(part.targets(ridge)).cv_cc for part in parts]
    extended = ridge.extended(share_beyond_grid(np.concatenate(cv_cc, axis=1)))
    if extended is not None:
        grid = f"{min(extended.ridge_alphas):g} to {max(extended.ridge_alphas):g}"
        log(f"{subject}: many voxels chose an edge of the ridge_alphas, so the grid is {grid}")
    elif fit is not None:
        yield fit
        return
    for part in parts:
        yield (extended or ridge).fit(part.targets(ridge))


def _clock(stories: Sequence[Story]) -> tuple[float, float]:
    """Return the TR in s, and the median over stories of the middle of the first volume."""
    steps = [float(np.mean(np.diff(story.tr_times_s))) for story in stories]
    for story, step in zip(stories, steps, strict=True):
        if abs(step - steps[0]) > MAX_TR_ERROR * steps[0]:
            raise InputError(f"story {story.name}: a TR of {step:g} s, but {steps[0]:g} s in {stories[0].name}")
    return steps[0], float(np.median([story.tr_times_s[0] for story in stories]))


def _check_disk(file: Path, n_bytes: int) -> None:
    free = shutil.disk_usage(file.parent).free
    if n_bytes + SPARE_BYTES > free:
        raise InputError(
            f"{file}: the weights take {n_bytes / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free there; free some, "
            "or give another place with --to"
        )


def adapter_hash(folder: Path) -> str:
    """Return a hash of an adapter's two files, and raise InputError if one is missing."""
    digest = hashlib.sha256()
    for name in ADAPTER_FILES:
        try:
            with (folder / name).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise InputError(
                f"{folder / name}: cannot be read ({error.strerror}); the model needs its adapter"
            ) from None
    return digest.hexdigest()[:16]


@contextmanager
def _adapter_copied(adapter: Path | None, file: Path) -> Iterator[None]:
    """Copy an adapter next to the model; if the model cannot be written, delete the copy."""
    if adapter is None:
        yield
        return
    folder = adapter_path(file)
    try:
        folder.mkdir(parents=True)
        for name in ADAPTER_FILES:
            shutil.copyfile(adapter / name, folder / name)
        yield
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # it may hold something else
            folder.parent.rmdir()
        if isinstance(error, OSError):
            raise InputError(f"{folder}: cannot be written ({error.strerror})") from None
        raise


def predict_story(
    model: EncodingModel, story: Story, encoder_name: str | None = None
) -> dict[str, Iterator[tuple[slice, np.ndarray]]]:
    """Predict the responses to a story, one block of voxels at a time.

    Returns subject -> iterator over blocks: columns among its predicted voxels, and responses to the rows that
    the trim keeps, (n_rows, n_columns) float32 in standard deviations. ``model.subjects[subject].voxels`` are the
    indices of all columns. ``encoder_name``: name or folder of the same pretrained encoder, if it has moved.

    Raises InputError if the story has another TR or no row left, or the encoder or the adapter is not the model's.
    """
    settings = model.settings
    rows = settings.trim_trs.rows(len(story.tr_times_s))
    if rows.stop <= rows.start:
        raise InputError(
            f"story {story.name}: {len(story.tr_times_s)} volumes, of which the trim cuts {sum(settings.trim_trs)}"
        )
    step, _ = _clock([story])
    if abs(step - settings.tr_s) > MAX_TR_ERROR * settings.tr_s:
        raise InputError(f"story {story.name}: a TR of {step:g} s; the model was fitted at {settings.tr_s:g} s")
    features = story_features(_vectors(model, story, encoder_name), story, settings.delays, settings.trim_trs)
    if features.shape[1] != model.n_features:
        raise InputError(
            f"{model.file}: damaged: weights for {model.n_features} features, but a story has {features.shape[1]}"
        )
    X = model.constants.apply(features)

    def blocks(subject: str) -> Iterator[tuple[slice, np.ndarray]]:
        for columns, weights in model.weights(subject):
            yield columns, X @ weights

    return {subject: blocks(subject) for subject in model.subjects}


def _vectors(model: EncodingModel, story: Story, encoder_name: str | None) -> np.ndarray:
    """Return word vectors, (n_words, n_hidden)."""
    settings = model.settings
    if model.adapter_folder is not None and adapter_hash(model.adapter_folder) != settings.adapter:
        raise InputError(f"{model.adapter_folder}: not the adapter that {model.file} was fitted with; put it back")
    encoder = load_encoder(encoder_name or settings.encoder)
    if checkpoint_fingerprint(encoder.name) != settings.checkpoint:
        raise InputError(f"{model.file}: was fitted with another {encoder.name}; its files have changed since")
    table = export_stories(
        Dataset(source=str(model.file), stories={story.name: story}, subjects=(), published_test=()),
        encoder,
        adapter=model.adapter_folder,
        layer=settings.layer,
        window_tokens=settings.window_tokens,
        stride=settings.stride,
    )
    return np.stack(table["vector"].to_list())
