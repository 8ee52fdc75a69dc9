"""The command line on an imitation of ds003020: subjects, voxels, regions, baselines, and going on with it."""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from make_lebel import make_lebel
from project import RUN
from study_process import run_command

from bert_encoding.trial.record import read_cc

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

N_VOXELS = 12
STORIES = ("adollshouse", "buck", "exorcism", "life", "undertheinfluence", "wheretheressmoke", "avatar")


@pytest.mark.slow
def test_ds003020_with_chosen_voxels_regions_and_baselines(tmp_path: Path, private_tmp: Path, tiny_bert: Path) -> None:
    root = make_lebel(tmp_path / "ds003020", STORIES, ("UTS01", "UTS03"), n_words=300, n_voxels=N_VOXELS)
    responses = root / "derivative" / "preprocessed_data"
    (responses / "UTS01" / "rois.json").write_text(json.dumps({"AC": [0, 1], "noise": [11]}))
    vectors = tmp_path / "glove.txt"
    rng = np.random.default_rng(0)
    words = "the a and to of i was it in that he she my we you had said on with but".split()
    vectors.write_text("".join(f"{word} {' '.join(f'{x:.3f}' for x in rng.standard_normal(5))}\n" for word in words))
    out = tmp_path / "out"
    command = [sys.executable, str(RUN), "--space", "smoke", "--data", str(root), "--model", str(tiny_bert)]
    command += ["--out", str(out), "--name", "s", "--trials", "1", "--voxels", "5", "--confirm", "0"]
    done = run_command(
        [*command, "--baselines", "bag_of_words", "random", "--static-vectors", str(vectors)], private_tmp
    )
    assert done.stderr == ""
    study = out / "s"

    trials = pd.read_parquet(study / "trials.parquet").set_index("trial_id")
    rows = ["frozen", "word_rate", "bag_of_words", "random", "static"]
    assert sorted(trials.index) == sorted([*(f"baseline-{name}" for name in rows), "0001"])
    assert (trials["status"] == "COMPLETE").all()

    with np.load(study / "voxels.npz") as kept:
        chosen = {subject: kept[subject] for subject in kept.files}
    assert sorted(chosen) == ["UTS01", "UTS03"]
    subjects = pd.read_parquet(study / "subjects.parquet").set_index(["trial_id", "subject"])
    for trial_id in trials.index:
        cc = read_cc(study, trial_id)
        for subject, voxels in chosen.items():
            assert voxels.size == 5
            assert np.flatnonzero(np.isfinite(cc[subject])).tolist() == voxels.tolist()
            mean = cc[subject][voxels].mean()
            assert subjects.loc[(trial_id, subject), "cc_mean"] == pytest.approx(mean, abs=1e-6)
        both = [subjects.loc[(trial_id, subject), "cc_mean"] for subject in chosen]
        assert trials.loc[trial_id, "cc_mean"] == pytest.approx(np.mean(both), abs=1e-9)
    heard = [voxel for voxel in (0, 1) if voxel in chosen["UTS01"]]
    assert heard, "the planted voxels are chosen"
    region = read_cc(study, "0001")["UTS01"][heard].mean()
    assert trials.loc["0001", "cc_roi_AC"] == pytest.approx(region, abs=1e-6)

    resume = [sys.executable, str(RUN), "--resume", "--out", str(out)]
    again = run_command(resume, private_tmp)
    assert "nothing to do" in again.stdout
    for option, message in (
        (("--voxels", "6"), "the voxels changed"),
        (("--trim", "course", "--trust-alignment"), "the trim changed"),
    ):
        refused = run_command([*resume, *option], private_tmp, code=2)
        assert message in refused.stderr

    np.savez(study / "voxels.npz", UTS01=np.arange(7, 12), UTS03=np.arange(7, 12))
    refused = run_command([*resume, "--trials", "2"], private_tmp, code=2)
    assert f"{study / 'voxels.npz'}: not the voxels on which this study's trials were scored" in refused.stderr
