"""The tables and verdicts of a study, which figures and the report show.

``gather`` (gather.py) reads a study and returns an ``Evidence``; figures and report only present it.
"""

from typing import NamedTuple

import pandas as pd

from study.results.facts import Facts
from study.results.verdicts.rules import Verdict


class Levels(NamedTuple):
    """Reference lines of a CC axis; None where unknown."""

    frozen: float | None = None  # on the validation stories (held-out texts)
    word_rate: float | None = None
    frozen_test: float | None = None
    word_rate_test: float | None = None
    ceiling: float | None = None  # mean of CC_max over voxels and over the stories that have repeats
    ceiling_test: float | None = None


class Evidence(NamedTuple):
    """A study in tables. Tables without rows keep their columns.

    Attributes
    ----------
    epochs : one row per trial and epoch: trial_id, phase, epoch, rank, lr, seed, cc_mean, mlm_loss_train,
        mlm_loss_heldout, seconds, is_used (included in analyses of rank), and other scores of the epoch
    stories : one row per trial, split, role, subject and story: trial_id, phase, split, role, subject, story, cc_mean
    used : the trials that analyses of rank include: complete searched LoRA trials, no repeats; further columns
        log2_rank, log10_lr, scaling_rule (``lora_alpha = 2 r``, ``lora_alpha = 16``, ``rsLoRA lora_alpha = 6``),
        loss_gap (held-out minus training masked-LM loss, nats) and forgetting (probe loss after minus before, nats)
    by_rank : one row per outcome and rank: outcome, rank, n_trials, n_seeds, n_stories, mean, low, high (95%, NaN where
        unknown), sd_seeds (between seeds of one setting), covers (what the interval includes, in words)
    importances : one row per parameter, most important first: parameter, importance (share of the score's variance,
        fANOVA), low, high (95% bootstrap over trials), n_trials
    confirmed : one row per test-set evaluation and finalist, the winner first (``confirmed.COLUMNS``): cc_searched,
        cc_confirmed (mean over fresh seeds, validation), selection_bias (searched minus confirmed), cc_test,
        gain_test with low and high (95%) over ``unit``, gain_of_stories (mean over test stories), ...
    seconds : one row per trial: trial_id, phase, seconds_train, seconds_embed, seconds_ridge, seconds_other,
        seconds_total
    """

    facts: Facts
    levels: Levels
    left_out: str  # searched trials that analyses of rank exclude, in words; empty if none
    trials: pd.DataFrame  # one row per trial of any phase and status (``load_trials``)
    epochs: pd.DataFrame
    stories: pd.DataFrame
    used: pd.DataFrame
    by_rank: pd.DataFrame
    rank_by_lr: pd.DataFrame  # one row per rank and learning rate: rank, lr, n_trials, cc_mean
    slopes: pd.DataFrame  # one row per outcome, adjustment and subset (``slopes.COLUMNS``, ``SlopeKey``)
    importances: pd.DataFrame
    history: pd.DataFrame  # complete searched trials in order: number (from 1), trial_id, value, best_so_far
    varied: tuple[str, ...]  # parameters that the search varied, as columns of ``used`` or ``trials``
    confirmed: pd.DataFrame
    voxels: pd.DataFrame  # one row per subject and voxel: subject, voxel, frozen, best (validation CC; NaN if masked)
    best_id: str | None  # the best complete searched trial
    seconds: pd.DataFrame
    verdicts: tuple[Verdict, ...]  # on fine-tuning, then on rank; empty for text-only studies
    warnings: tuple[str, ...]  # one line each
