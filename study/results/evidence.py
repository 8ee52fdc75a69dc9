"""Everything that a study found, in tables and verdicts: what figures draw and the report tells.

``gather`` (gather.py) reads a study and returns an ``Evidence``; nothing that comes after it computes.
"""

from typing import Any, NamedTuple

import pandas as pd

from study.results.rank_tables import LeftOut as LeftOut
from study.results.verdicts.rules import Effect as Effect
from study.results.verdicts.rules import Verdict as Verdict


class Facts(NamedTuple):
    """What study this is.

    Attributes
    ----------
    name, task, question, data, model : of ``study.json``; ``task`` is encoding, classification or adapt, ``question``
        the first line of the space
    space : its name
    sampler, scheduler : how points were chosen, and how trials were stopped early
    is_adaptive : later points depended on earlier scores (tpe, gp, cmaes), or trials were stopped by theirs: what is
        told of parameters is exploratory
    metric, metric_label, is_gain : the column that was searched, its name for readers, and whether more is better
    n_asked : searched trials that the study shall have
    n_searched, n_complete, n_stopped, n_failed, n_repeats : searched trials that ended, and how; repeats of a complete
        trial count as complete and as repeats
    n_voxels : by subject; empty on text
    stories : fit, validation and test stories by role; empty on text; of several outer folds the union of each
    n_folds : outer folds
    is_confirmed : some finalist was scored on the test stories
    forced, looks : what ``study.json`` says of being forced to go on; the looks at the test stories (confirm.json)
    study : all of ``study.json``
    """

    name: str
    task: str
    question: str
    data: str
    model: str
    space: str
    sampler: str
    scheduler: str
    is_adaptive: bool
    metric: str
    metric_label: str
    is_gain: bool
    n_asked: int
    n_searched: int
    n_complete: int
    n_stopped: int
    n_failed: int
    n_repeats: int
    n_voxels: dict[str, int]
    stories: dict[str, tuple[str, ...]]
    n_folds: int
    is_confirmed: bool
    forced: list[dict[str, Any]]
    looks: list[dict[str, Any]]
    study: dict[str, Any]

    @property
    def is_finished(self) -> bool:
        """Whether all searched trials have ended."""
        return self.n_searched >= self.n_asked


class Levels(NamedTuple):
    """Horizontal lines of a CC axis; None where unknown.

    Attributes
    ----------
    frozen, word_rate : mean CC of the baselines on the validation stories (of a text task: the metric)
    frozen_test, word_rate_test : on the test stories
    ceiling, ceiling_test : mean noise ceiling CC_max over voxels and over the stories of that role that have repeats
    """

    frozen: float | None
    word_rate: float | None
    frozen_test: float | None
    word_rate_test: float | None
    ceiling: float | None
    ceiling_test: float | None


class Evidence(NamedTuple):
    """A study in tables. A table without rows has its columns all the same.

    Attributes
    ----------
    facts, levels, left_out : see their classes
    trials : ``analysis.load_trials``, a row a trial of any phase and status
    epochs : a row a trial and epoch: trial_id, phase, epoch, rank, lr, seed, cc_mean, mlm_loss_train,
        mlm_loss_heldout, seconds, is_used (counted in analyses of rank), and whatever else an epoch reports
    stories : a row a trial, split, role, subject and story: trial_id, phase, split, role, subject, story, cc_mean
    used : the rows of ``trials`` that analyses of rank count: complete searched LoRA trials, no repeats; with further
        columns log2_rank, log10_lr, scaling_rule (text: ``alpha = 2 r``, ``alpha = 16``, ``rsLoRA alpha = 6``),
        loss_gap (held-out less training masked-LM loss) and forgetting (probe loss after less before; nats)
    by_rank : a row an outcome and rank: outcome (cc_mean, adaptation_gap, mlm_loss_train, mlm_loss_heldout, loss_gap,
        forgetting, delta_norm, epoch_best; accuracy and
        macro_f1 of a classification), rank, n_trials, n_seeds, n_stories (0 where stories do not enter), mean,
        low, high (95%; over seeds and, of cc_mean, validation stories; NaN where unknown), sd_seeds (between seeds of
        one setting, NaN without replicates), covers (in words)
    rank_by_lr : a row a rank and learning rate that was tried: rank, lr, n_trials, cc_mean
    best_lr : a row a rank at its own best learning rate: rank, lr, n_lr (how many were compared, the same for every
        rank), n_trials, cc_chosen (mean over the trials that chose it; flatters), cc_mean (mean over seeds that did
        not choose it: each seed is scored at the rate that the other seeds choose; NaN with one seed). Empty where
        ranks did not try the same rates
    slopes : a row an outcome, adjustment and subset: outcome (cc_mean, mlm_loss_heldout, adaptation_gap, loss_gap;
        cc_seen, CC on the stories that fine-tuning read; cc_mean is here the mean over stories of CC inside each;
        no slopes are cc_bend, the CC of middle ranks less the mean of both ends, cc_rank_by_lr, the effect of rank at
        the highest learning rate less that at the lowest, and cc_rank_by_rule, that with the second of two scaling
        rules less that with the first),
        adjustment (``none``: seeds alone; ``nuisance``: also lr, scaling rule, targets, steps as far as they vary and
        rank does not fix them; ``step size``: also the size of the scaling), adjusted_for (words), subset (``all``, a
        scaling_rule, two of them as ``a | b``, or a learning rate as ``lr 0.001``),
        n_trials, n_ranks, n_stories, df, slope (a doubling of rank), se, effect (over the range of ranks tried), low,
        high (95%), low_90, high_90, low_99, high_99 (of effect), se_trials, se_stories (of effect), sd_trial
        (residual), variance (of log2 rank that nuisances leave, the range taken as 1), boot_low, boot_high (95%,
        bootstrap over stories and trials, of effect; too narrow below 6 stories), p (two-sided, effect = 0)
    importances : a row a parameter: parameter, importance (share of the score's variance, fANOVA), low, high (95%
        bootstrap over trials), n_trials; most important first
    history : a row a complete searched trial in order: number (from 1), trial_id, value (of the metric), best_so_far
    varied : columns of ``used`` (or, where no LoRA was searched, of ``trials``) that the search varied, for parallel
        coordinates
    confirmed : a row a finalist, the winner first: look, trial_id, is_winner, rank, lr, cc_searched, cc_confirmed (mean
        over fresh seeds, validation), n_seeds, selection_bias (searched less confirmed), cc_frozen (validation),
        cc_test, frozen_test, gain_test, low, high (95% of gain_test), unit (what that interval resamples),
        gain_of_stories (CC inside each test story less that of frozen, mean over stories, of which the verdict speaks;
        the columns before are of CC over their joined TRs), test_id, frozen_test_id (trials of the test scores)
    selection_bias : CC; of the best searched trial: its search CC less its confirmed CC. None if not confirmed
    voxels : a row a subject and voxel: subject, voxel, frozen, best (CC on the validation stories; NaN where masked)
    best_id : the best complete searched trial, None if there is none
    seconds : a row a trial: trial_id, phase, seconds_train, seconds_embed, seconds_ridge, seconds_other, seconds_total
    verdicts : of fine-tuning at all, then of rank; empty on text
    warnings : what a reader should know, a line each
    """

    facts: Facts
    levels: Levels
    left_out: LeftOut
    trials: pd.DataFrame
    epochs: pd.DataFrame
    stories: pd.DataFrame
    used: pd.DataFrame
    by_rank: pd.DataFrame
    rank_by_lr: pd.DataFrame
    best_lr: pd.DataFrame
    slopes: pd.DataFrame
    importances: pd.DataFrame
    history: pd.DataFrame
    varied: tuple[str, ...]
    confirmed: pd.DataFrame
    selection_bias: float | None
    voxels: pd.DataFrame
    best_id: str | None
    seconds: pd.DataFrame
    verdicts: tuple[Verdict, ...]
    warnings: tuple[str, ...]
