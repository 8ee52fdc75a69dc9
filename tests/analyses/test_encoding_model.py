"""Saved encoding models predict what their trials predicted; damaged and hostile files are refused."""

import io
import json
import shutil
import tracemalloc
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from make_data import edit_responses, make_lab, make_tiny_bert, put
from make_trials import PEFT_WARNS, make_task
from safetensors.torch import load_file, save_file
from sklearn.linear_model import Ridge

from bert_encoding.analyses import encoding_model, model_file
from bert_encoding.analyses.encoding_model import Origin, fit_encoding_model, predict_story
from bert_encoding.analyses.model_file import EncodingModel, FittedSubject, ModelSettings, load_model, write_model
from bert_encoding.core.errors import InputError
from bert_encoding.core.zscore import ZScore
from bert_encoding.datasets import open_dataset
from bert_encoding.datasets.story import Trim
from bert_encoding.language_model.encoder import Encoder
from bert_encoding.language_model.lora import load_adapter
from bert_encoding.regression import response_panels
from bert_encoding.statistics.correlation import correlate
from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.pipeline import Chain, Task
from bert_encoding.trial.record import TrialRecord
from bert_encoding.trial.run import run_trial

SUBJECTS, N_VOXELS, BAD = ("a", "b"), 12, 4

pytestmark = PEFT_WARNS


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    """Two subjects; voxel 4 of the first is not finite in one story."""
    folder = make_lab(tmp_path_factory.mktemp("data") / "lab", subjects=SUBJECTS, n_words=100, n_voxels=N_VOXELS)
    edit_responses(folder, "beta", put((3, BAD), np.nan), "a")
    return make_task(open_dataset(folder))


Trial = tuple[Chain, TrialRecord, Path | None]
Saved = Callable[[str], EncodingModel]


@pytest.fixture(scope="module")
def trials(task: Task, tiny_encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trial]:
    """The frozen encoder, and a fine-tuned one read at two layers."""
    base = TrialConfig(
        model=tiny_encoder.name, precision="float32", embed_precision="float32", epochs=1, lr=1e-2, warmup_epochs=0.0
    )
    base = replace(base, embed_window_tokens=64, embed_stride=40)
    frozen, lora = replace(base, method="frozen"), replace(base, layer=(1, 2))
    folder = tmp_path_factory.mktemp("trial") / "adapter"
    return {
        "frozen": (Chain(frozen, task), run_trial(frozen, task), None),
        "lora": (Chain(lora, task), run_trial(lora, task, adapter_folder=folder), folder),
    }


def fit_trial(trial: Trial, file: Path) -> Path:
    chain, record, adapter = trial
    origin = Origin("study", "0001", record.cc)
    fit_encoding_model(chain, chain.task.splits[0].fit, file, adapter=adapter, origin=origin)
    return file


@pytest.fixture(scope="module")
def saved(trials: dict[str, Trial], tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Fit a model on the fit stories, once per method."""
    models: dict[str, EncodingModel] = {}

    def fit(method: str) -> EncodingModel:
        if method not in models:
            models[method] = load_model(fit_trial(trials[method], tmp_path_factory.mktemp("saved") / "model.npz"))
        return models[method]

    return fit


def predicted(model: EncodingModel, task: Task, stories: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Return the predictions of several stories, subject -> (n_rows, n_voxels)."""
    parts: dict[str, list[np.ndarray]] = {subject: [] for subject in model.subjects}
    for name in stories:
        for subject, blocks in predict_story(model, task.dataset.stories[name]).items():
            parts[subject].append(np.hstack([block for _, block in blocks]))
    return {subject: np.vstack(rows) for subject, rows in parts.items()}


def measured(task: Task, subject: str, stories: tuple[str, ...]) -> np.ndarray:
    return np.vstack([task.dataset.valid_responses(name, subject) for name in stories])


@pytest.mark.parametrize("method", ["frozen", "lora"])
def test_validation_cc_equals_the_record(method: str, saved: Saved, trials: dict[str, Trial], task: Task) -> None:
    model, names = saved(method), task.splits[0].validation
    predictions = predicted(model, task, names)
    for subject in SUBJECTS:
        part, recorded = model.subjects[subject], trials[method][1].cc[subject]
        cc = correlate(measured(task, subject, names), predictions[subject])
        np.testing.assert_allclose(cc, recorded[part.voxels], rtol=0, atol=2e-5)
        np.testing.assert_array_equal(part.cc, recorded[part.voxels])
    assert model.subjects["a"].voxels.tolist() == [v for v in range(N_VOXELS) if v != BAD]
    assert {part.n_all for part in model.subjects.values()} == {N_VOXELS}


@pytest.mark.parametrize("method", ["frozen", "lora"])
def test_predictions_equal_scikit_learn_on_the_trials_features(
    method: str, saved: Saved, trials: dict[str, Trial], task: Task, tiny_encoder: Encoder
) -> None:
    (chain, _, adapter), split, model = trials[method], task.splits[0], saved(method)
    bert = tiny_encoder.copy_model().bert if adapter is None else load_adapter(tiny_encoder, adapter)
    downsampled = chain.downsampled(bert, split.fit + split.validation, split.fit)
    X = {
        n: np.vstack([np.vstack([np.zeros((d, 32)), v[:-d]]).T for d in (1, 2, 3, 4)]).T for n, v in downsampled.items()
    }
    X_fit, X_new = (np.vstack([X[n][10:-5] for n in names]) for names in (sorted(split.fit), split.validation))
    mean, std = X_fit.mean(axis=0), X_fit.std(axis=0)
    predictions = predicted(model, task, split.validation)
    for subject in SUBJECTS:
        Y = measured(task, subject, tuple(sorted(split.fit))).astype(np.float64)
        Y = (Y - Y.mean(axis=0)) / Y.std(axis=0)
        ridge = Ridge(model.subjects[subject].ridge_alphas, fit_intercept=False).fit((X_fit - mean) / std, Y)
        expected = ridge.predict((X_new - mean) / std)
        np.testing.assert_allclose(predictions[subject], expected, rtol=0, atol=2e-3 * expected.std())


def test_block_and_panel_sizes_have_no_effect(
    trials: dict[str, Trial], saved: Saved, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, names = saved("frozen"), task.splits[0].validation
    expected = predicted(model, task, names)
    monkeypatch.setattr(model_file, "BLOCK_BYTES", 5 * 4 * model.n_features)
    widths = [columns.stop - columns.start for columns, _ in model.weights("b")]
    assert widths == [5, 5, 2]
    np.testing.assert_allclose(predicted(model, task, names)["b"], expected["b"], rtol=0, atol=1e-5)
    monkeypatch.setattr(response_panels, "PANEL_BYTES", 20_000)
    assert len(list(response_panels.panels(task.dataset, "b", (), (), 500))) > 1
    panelled = predicted(load_model(fit_trial(trials["frozen"], tmp_path / "model.npz")), task, names)
    np.testing.assert_allclose(panelled["a"], expected["a"], rtol=0, atol=1e-4)


def test_equal_models_give_equal_bytes_readable_by_numpy(
    trials: dict[str, Trial], saved: Saved, tmp_path: Path
) -> None:
    model, adapter = saved("lora"), trials["lora"][2]
    assert fit_trial(trials["lora"], tmp_path / "other.npz").read_bytes() == model.file.read_bytes()
    assert adapter is not None and model.adapter_folder is not None
    for name in encoding_model.ADAPTER_FILES:
        assert (tmp_path / "other" / "adapter" / name).read_bytes() == (adapter / name).read_bytes()
    with np.load(model.file, allow_pickle=False) as arrays:
        weights = np.hstack([block for _, block in model.weights("b")])
        np.testing.assert_array_equal(arrays["b/weights"], weights)
        assert weights.shape == (model.n_features, N_VOXELS) and weights.dtype == np.float32
        assert json.loads(str(arrays["settings"]))["layer"] == [1, 2]


def without_effect(weights: Path) -> None:
    save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(weights).items()}, weights)


def test_a_missing_or_changed_adapter_is_refused(saved: Saved, task: Task, tmp_path: Path) -> None:
    source, story = saved("lora"), next(iter(task.dataset.stories.values()))
    file = Path(shutil.copy(source.file, tmp_path / "model.npz"))
    with pytest.raises(InputError, match=r"adapter_config.json: cannot be read"):
        predict_story(load_model(file), story)
    shutil.copytree(source.file.parent / "model", tmp_path / "model")
    predict_story(load_model(file), story)
    without_effect(tmp_path / "model" / "adapter" / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"not the adapter that .*model.npz was fitted with"):
        predict_story(load_model(file), story)


def test_an_adapter_without_effect_is_not_saved(trials: dict[str, Trial], tmp_path: Path) -> None:
    chain, record, adapter = trials["lora"]
    assert adapter is not None
    idle = Path(shutil.copytree(adapter, tmp_path / "idle"))
    without_effect(idle / "adapter_model.safetensors")
    with pytest.raises(InputError, match="changes nothing"):
        fit_trial((chain, record, idle), tmp_path / "model.npz")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["idle"]


def test_another_encoder_or_tr_is_refused(saved: Saved, task: Task, tiny_bert: Path, tmp_path: Path) -> None:
    model, story = saved("frozen"), task.dataset.stories["alpha"]
    with pytest.raises(InputError, match="was fitted with another"):
        predict_story(model, story, str(make_tiny_bert(tmp_path / "other", seed=1)))
    moved = Path(shutil.copytree(tiny_bert, tmp_path / "moved"))
    blocks = [list(predict_story(model, story, name)["a"]) for name in (None, str(moved))]
    np.testing.assert_array_equal(blocks[0][0][1], blocks[1][0][1])
    slower = replace(story, tr_times_s=story.tr_times_s * 1.05)
    with pytest.raises(InputError, match=r"story alpha: a TR of 2.1 s; the model was fitted at 2 s"):
        predict_story(model, slower)
    with pytest.raises(InputError, match=r"story alpha: 15 volumes, of which the trim cuts 15"):
        predict_story(model, replace(story, tr_times_s=story.tr_times_s[:15]))


@pytest.mark.parametrize("failure", ["disk", "writing"])
def test_no_file_is_left_if_the_model_cannot_be_written(
    failure: str, trials: dict[str, Trial], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*of: object) -> None:
        raise OSError(28, "No space left on device")

    if failure == "disk":
        monkeypatch.setattr(encoding_model.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    else:
        monkeypatch.setattr(model_file, "_write_weights", fail)
    with pytest.raises(InputError, match=r"are free there|cannot be written .No space left"):
        fit_trial(trials["lora"], tmp_path / "model.npz")
    assert list(tmp_path.iterdir()) == []


def test_no_file_is_overwritten(trials: dict[str, Trial], tmp_path: Path) -> None:
    (tmp_path / "model.npz").write_text("precious")
    for name, message in (("model.npz", "exists already"), ("m.npy", "ends in .npz"), ("no/m.npz", "no such folder")):
        with pytest.raises(InputError, match=message):
            fit_trial(trials["frozen"], tmp_path / name)
    assert (tmp_path / "model.npz").read_text() == "precious"


SETTINGS = ModelSettings(
    "tiny", "0", None, 2, 64, 40, (1, 2), Trim(10, 5), 2.0, -9.0, ("alpha",), ("omega",), "fingerprint", "study", "0001"
)
N_FEATURES, N_KEPT = 6, 5


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A small model without BERT."""
    rng = np.random.default_rng(0)
    blocks = [(rng.standard_normal((N_FEATURES, n)).astype(np.float32), np.full(n, 10.0)) for n in (3, 2)]
    part = FittedSubject(9, np.array([0, 2, 3, 7, 8]), np.full(N_KEPT, np.nan, np.float32), blocks)
    constants = ZScore(rng.standard_normal(N_FEATURES), np.ones(N_FEATURES))
    write_model(tmp_path / "model.npz", SETTINGS, constants, {"a": part})
    return tmp_path / "model.npz"


def npy(values: np.ndarray) -> bytes:
    raw = io.BytesIO()
    np.lib.format.write_array(raw, values, version=(1, 0), allow_pickle=False)
    return raw.getvalue()


def rewrite(file: Path, changes: dict[str, bytes | None], compression: int = zipfile.ZIP_STORED) -> None:
    """Replace, add or (None) drop members."""
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()} | changes
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            if content is not None:
                archive.writestr(name, content)


def with_settings(file: Path, **changes: Any) -> bytes:
    with np.load(file) as arrays:
        return npy(np.array(json.dumps(json.loads(str(arrays["settings"])) | changes)))


def claiming(shape: str, content: bytes = b"") -> bytes:
    header = f"{{'descr': '<f4', 'fortran_order': True, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + content


WEIGHTS = np.asfortranarray(np.ones((N_FEATURES, N_KEPT), np.float32))
DAMAGES: list[tuple[dict[str, Any], str]] = [
    ({"a/weights.npy": npy(np.asfortranarray(WEIGHTS * np.nan))}, "a/weights are not finite"),
    ({"a/weights.npy": npy(WEIGHTS[:, :4])}, r"shape \(6, 4\)"),
    ({"a/weights.npy": npy(WEIGHTS.astype(np.float64))}, "float64"),
    ({"a/weights.npy": npy(np.ascontiguousarray(WEIGHTS))}, "Fortran"),
    ({"a/weights.npy": npy(WEIGHTS)[:-4]}, "in 116 bytes"),
    ({"a/weights.npy": claiming("(1099511627776, 1099511627776)")}, "1099511627776"),
    ({"a/weights.npy": claiming("(6, 5)")}, "in 0 bytes"),
    ({"mean.npy": claiming("(6,)").replace(b"'<f4'", b"'|O' ")}, "object"),
    ({"mean.npy": claiming("__import__('os')")}, "damaged"),
    ({"a/cc.npy": None}, "a/cc.npy is missing"),
    ({"settings.npy": None}, "settings.npy is missing"),
    ({"extra.npy": npy(WEIGHTS)}, "extra.npy is not expected"),
    ({"scale.npy": npy(np.zeros(N_FEATURES))}, "scale is not above 0"),
    ({"a/voxels.npy": npy(np.array([0, 2, 2, 7, 8]))}, "not ascending indices below 9"),
    ({"a/voxels.npy": npy(np.array([0, 2, 3, 7, 9]))}, "not ascending indices below 9"),
    ({"a/ridge_alphas.npy": npy(np.zeros(N_KEPT))}, "ridge_alpha is not above 0"),
    ({"settings.npy": npy(np.arange(3))}, "not text"),
    ({"settings.npy": npy(np.array("{"))}, "damaged"),
]
WRONG_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"version": 1}, "of version 1, expected 2"),
    ({"delays": []}, "delays"),
    ({"delays": [1, 2, 3, 4]}, "n_features is 6"),
    ({"tr_s": 0}, "tr_s"),
    ({"tr_s": "2"}, "tr_s"),
    ({"trim_trs": [1]}, "trim_trs"),
    ({"layer": "last"}, "layer"),
    ({"adapter": 3}, "adapter"),
    ({"test_stories": "omega"}, "test_stories"),
    ({"test_stories": [3]}, "test_stories"),
    ({"subjects": {"../a": {"n_all": 9, "n_voxels": 5}}}, r"subject '\.\./a'"),
    ({"subjects": {"a": {"n_all": 2**39, "n_voxels": 5}}}, "subject 'a'"),
    ({"subjects": []}, "settings"),
]


@pytest.mark.parametrize(("changes", "message"), DAMAGES + WRONG_SETTINGS)
def test_damaged_files_are_refused_in_one_line(changes: dict[str, Any], message: str, file: Path) -> None:
    is_settings = not any(name.endswith(".npy") for name in changes)
    rewrite(file, {"settings.npy": with_settings(file, **changes)} if is_settings else changes)
    assert_refused(file, message)


def test_a_flipped_bit_and_missing_bytes_are_refused_in_one_line(file: Path, tmp_path: Path) -> None:
    assert load_model(file).settings == SETTINGS
    content = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        content[archive.getinfo("a/weights.npy").header_offset + 200] ^= 1
    for remains, message in ((content, "Bad CRC-32"), (content[:-300], "not a zip file"), (b"", "not a zip file")):
        file.write_bytes(remains)
        assert_refused(file, message)
    assert_refused(tmp_path / "absent.npz", "no such file")


def test_a_compressed_member_is_refused_before_it_is_read(file: Path) -> None:
    bomb = claiming("(6, 5)", bytes(2**26))
    rewrite(file, {"a/weights.npy": bomb}, zipfile.ZIP_DEFLATED)
    assert file.stat().st_size < 2**20
    del bomb
    tracemalloc.start()
    assert_refused(file, "compressed")
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


def assert_refused(file: Path, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_model(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
