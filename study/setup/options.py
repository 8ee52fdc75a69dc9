"""The options of ``study/run.py``, each written once: type, group and help for the command line, and what it means."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypeAlias

from cyclopts import Group, Parameter

from bert_encoding.core.command_line import Names, Number, Text, Whole
from bert_encoding.core.devices import PRECISIONS
from bert_encoding.core.names import ENCODING
from bert_encoding.core.storage import Place, open_place
from bert_encoding.datasets.story import TRIMS
from bert_encoding.trial.config import MLM_TEXTS, TrialConfig
from study.cluster.machines import Machines
from study.setup.delta import DELTA
from study.setup.samplers import NO_SCHEDULER, SCHEDULERS

ALL = "all"
STUDY, MACHINES, SESSION = "study", "machines", "session"
TEXT_ONLY = "text only"

if TYPE_CHECKING:  # resolved options have a value
    ResolvedText: TypeAlias = str
    ResolvedWhole: TypeAlias = int
    ResolvedNumber: TypeAlias = float
    ResolvedNames: TypeAlias = list[str]
    ResolvedLayer: TypeAlias = int | tuple[int, ...] | None
    ResolvedMachines: TypeAlias = Machines
else:  # on the command line an option may be absent
    ResolvedText, ResolvedWhole, ResolvedNumber, ResolvedNames = Text, Whole, Number, Names
    ResolvedLayer, ResolvedMachines = Text, Machines | None


def _group(name: str, position: int) -> Parameter:
    return Parameter(group=Group(name, sort_key=position))


THE_STUDY = _group("Study", 1)
DATA = _group("Data", 2)
WORD_VECTORS = _group("Word vectors", 3)
FINE_TUNING = _group("Fine-tuning", 4)
BASELINES = _group("Baselines", 5)
SEARCH = _group("Search", 6)
CONFIRMATION = _group("Confirmation and verdicts", 7)
TEXTS = _group("Text-only studies", 8)
RESOURCES = _group("Machines", 9)
OUTPUT = _group("Output", 10)
RESUMING = _group("Resuming", 11)
NOT_AN_OPTION = Parameter(parse=False)

Check = Callable[[Any], str | None]  # value -> what is wrong with it


class Meaning(NamedTuple):
    """What an option means for a study.

    Its scope is STUDY (``study.json`` records it, and a resumed study takes it from there), MACHINES (recorded only if
    the user set it, and used again where the machines allow it) or SESSION (never recorded).
    """

    default: Any = None  # if neither the user nor a resumed study sets it; also where it depends on space or machine
    scope: str = STUDY
    task: str | None = None  # ENCODING or TEXT_ONLY for an option of that kind of study alone
    check: Check | None = None


def option(default: Any = None, scope: str = STUDY, task: str | None = None, check: Check | None = None) -> Any:
    """Return a dataclass field that is None, or False for a flag, until its option is set or resolved."""
    return field(
        default=False if default is False else None, metadata={"meaning": Meaning(default, scope, task, check)}
    )


def at_least(lowest: int) -> Check:
    return lambda value: None if value >= lowest else f"must be at least {lowest}"


def one_of(names: Any) -> Check:
    return lambda value: None if value in names else f"must be one of {', '.join(names)}"


def _positive_seconds(value: float) -> str | None:
    return None if 0 < value < math.inf else "must be a number of seconds above 0"


def _folder_name(value: str) -> str | None:
    return "must be a plain folder name" if not value or "/" in value or value.startswith(".") else None


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of ``study/run.py``.

    The command line leaves an option that is not set at None, and a flag at False; ``resolve_options`` fills in all of
    them. The text below an option is its help.
    """

    space: Annotated[ResolvedText, THE_STUDY] = option()
    """Search space: a bundled one (lora_rank_small, lora_rank, lora_full, full_vs_lora, layers, nsp, sentiment_lora,
    smoke) or the path of your own FILE.py. [default: lora_full]"""
    data: Annotated[ResolvedText, THE_STUDY] = option()
    """Data set: 'demo', 'demo-null', 'demo-helps', or the folder of your data, whose format is recognised.
    [default: demo]"""
    model: Annotated[ResolvedText, THE_STUDY] = option()
    """BERT model: minilm, minilm-plain, a checkpoint folder or a name on the Hugging Face hub. [default: minilm for
    the demo, else bert-base-uncased]"""
    trials: Annotated[ResolvedWhole, THE_STUDY] = option(check=at_least(0))
    """Number of trials to search; 0 runs only the baselines, with their test scores. [default: the space's]"""
    epochs: Annotated[ResolvedWhole, THE_STUDY] = option(check=at_least(1))
    """Number of epochs of fine-tuning. [default: the space's]"""
    seed: Annotated[ResolvedWhole, THE_STUDY] = option(0, check=at_least(0))
    """Random seed of the study. [default: 0]"""

    trim: Annotated[ResolvedText, DATA] = option("published", task=ENCODING, check=one_of(TRIMS))
    """Volumes that the responses lack: 'published' (10 at the start, 5 at the end) or 'course' (5, 10).
    [default: published]"""
    trust_alignment: Annotated[bool, DATA] = option(False, task=ENCODING)
    """Run the study although the data check found that word rate predicts the responses best at an impossible lag."""
    subjects: Annotated[Names, DATA] = option(task=ENCODING)
    """Subjects whose responses are predicted. [default: all]"""
    voxels: Annotated[ResolvedText, DATA] = option(ALL, task=ENCODING)
    """Voxels to score: 'all', a number (per subject, those that the frozen encoder predicts best within the fit
    stories), or a FILE: .npy with indices or a mask, .npz with one array per subject. [default: all]"""
    train_stories: Annotated[Whole, DATA] = option(task=ENCODING)
    """Number of stories to use in addition to the test stories, drawn at random (--seed). [default: all]"""
    test_stories: Annotated[Names, DATA] = option(task=ENCODING)
    """Stories that are locked for the final score. [default: the published test stories of the data set]"""
    outer_folds: Annotated[ResolvedWhole, DATA] = option(1, task=ENCODING, check=at_least(1))
    """Number of outer folds over which fit and validation stories rotate, with one adapter per fold. [default: 1]"""

    layer: Annotated[ResolvedLayer, WORD_VECTORS] = option(task=ENCODING)
    """Layer whose hidden states are the word vectors: 'last', a number, or several to average, as in 4-6.
    [default: last]"""
    embed_precision: Annotated[ResolvedText, WORD_VECTORS] = option(
        TrialConfig.embed_precision, task=ENCODING, check=one_of(PRECISIONS)
    )
    """Precision of the matrix products that compute word vectors: 'float32', 'bfloat16' (two to three times faster on
    processors with native bfloat16) or 'auto', the faster one; it is fixed when the study begins. [default: auto]"""

    mlm_text: Annotated[ResolvedText, FINE_TUNING] = option("fit", task=ENCODING, check=one_of(MLM_TEXTS))
    """Text that fine-tuning reads: 'fit' (the fit stories), 'all', or 'control' (unrelated text). [default: fit]"""
    control_text: Annotated[ResolvedText, FINE_TUNING] = option("")
    """FILE of unrelated text, for --mlm-text control and for replay. [default: bundled, a few thousand words]"""
    probe: Annotated[ResolvedText, FINE_TUNING] = option("")
    """FILE of text other than stories, on which forgetting is measured. [default: bundled]"""

    baselines: Annotated[ResolvedNames, BASELINES] = option([], task=ENCODING)
    """Further baselines in addition to frozen and word_rate: bag_of_words, static, random (randomly initialised BERT).
    [default: none]"""
    static_vectors: Annotated[ResolvedText, BASELINES] = option("", task=ENCODING)
    """FILE of GloVe or word2vec vectors for the baseline 'static', which this option adds."""

    sampler: Annotated[ResolvedText, SEARCH] = option()
    """How settings are suggested: tpe, gp, cmaes (numbers only; needs the extra 'cmaes'), random, qmc (spread evenly)
    or grid (every point once). [default: the space's, else tpe]"""
    scheduler: Annotated[ResolvedText, SEARCH] = option(NO_SCHEDULER, check=one_of(SCHEDULERS))
    """Stop trials early if they do worse than others after the same number of epochs: 'asha' (the better half
    continues after 1, 2, 4, ... epochs), 'median' (trials below the median stop) or 'none'. [default: the space's,
    else none]"""
    score_every: Annotated[ResolvedWhole, SEARCH] = option(TrialConfig.score_every, task=ENCODING, check=at_least(1))
    """Number of epochs between computations of CC, which is always computed after the last; early stopping needs 1.
    [default: 1]"""

    confirm: Annotated[ResolvedWhole, CONFIRMATION] = option(3, check=at_least(0))
    """Number of finalists: the best trials run again with fresh seeds, the winner is fixed by its validation CC, and
    only then are all of them and the baselines scored once on the test stories; 0 leaves the test stories unread.
    [default: 3]"""
    confirm_seeds: Annotated[ResolvedWhole, CONFIRMATION] = option(2, task=ENCODING, check=at_least(1))
    """Number of fresh seeds per finalist. [default: 2]"""
    delta: Annotated[ResolvedNumber, CONFIRMATION] = option(DELTA, task=ENCODING)
    """Smallest difference in CC that matters; verdicts of 'no effect' depend on it. Set it in advance.
    [default: 0.002]"""

    train_examples: Annotated[Whole, TEXTS] = option(task=TEXT_ONLY)
    """Number of texts to train on; the others are held out. [default: four fifths]"""
    examples: Annotated[Whole, TEXTS] = option(task=TEXT_ONLY)
    """Number of texts to use, drawn at random (--seed). [default: all]"""
    max_length: Annotated[Whole, TEXTS] = option(task=TEXT_ONLY)
    """Number of tokens that are read of each text, counted from its end. [default: 512]"""
    clean: Annotated[bool, TEXTS] = option(False, task=TEXT_ONLY)
    """Remove emoji and all other non-ASCII characters."""

    address: Annotated[Text, RESOURCES] = option(scope=SESSION)
    """Address of a Ray cluster: HOST:PORT, 'auto' (on this node) or 'local'. [default: RAY_ADDRESS, else a cluster on
    this node, else local]"""
    cpus_per_trial: Annotated[ResolvedNumber, RESOURCES] = option(scope=MACHINES)
    """Number of CPUs per trial. [default: up to 2]"""
    gpus_per_trial: Annotated[ResolvedNumber, RESOURCES] = option(scope=MACHINES)
    """Number of GPUs per trial; a fraction lets trials share one. [default: 1 if there is one]"""
    max_concurrent: Annotated[ResolvedWhole, RESOURCES] = option(scope=MACHINES, check=at_least(1))
    """Number of trials that run at once. [default: as many as fit]"""
    trial_timeout: Annotated[Number, RESOURCES] = option(scope=MACHINES, check=_positive_seconds)
    """Seconds that a trial may take; then its worker is ended and the trial is recorded as failed.
    [default: no limit]"""

    name: Annotated[ResolvedText, OUTPUT] = option(scope=SESSION, check=_folder_name)
    """Name of the study. [default: space and date]"""
    out: Annotated[ResolvedText, OUTPUT] = option("results", scope=SESSION)
    """Where studies are stored: a folder, s3://bucket/prefix or gs://bucket/prefix. [default: results]"""
    keep_adapters: Annotated[ResolvedWhole, OUTPUT] = option(5, check=at_least(0))
    """Number of trials, the best ones, whose adapters are kept; the others are deleted for good. [default: 5]"""
    tensorboard: Annotated[bool, OUTPUT] = option(False, scope=MACHINES)
    """Write the scores of every epoch for TensorBoard into the folder 'tensorboard' of the study; not available in
    object storage."""

    machines: Annotated[ResolvedMachines, NOT_AN_OPTION] = option(scope=SESSION)
    """Where trials run."""
    requested: Annotated[dict[str, Any], NOT_AN_OPTION] = field(default_factory=dict)
    """Machine options as the user set them, now or when the study began; the machines may allow other values only."""
    deltas_before: Annotated[list[float], NOT_AN_OPTION] = field(default_factory=list)
    """Values that ``delta`` had earlier in this study, the first one first."""

    @property
    def folder(self) -> Place:
        return open_place(self.out) / self.name

    def set_values(self) -> dict[str, Any]:
        """Return the options that the command line set; a flag that is switched off counts as not set."""
        values = {name: getattr(self, name) for name in MEANINGS}
        return {name: value for name, value in values.items() if value is not None and value is not False}


MEANINGS: dict[str, Meaning] = {
    known.name: known.metadata["meaning"] for known in fields(Options) if "meaning" in known.metadata
}


@Parameter(name="*")
@dataclass(frozen=True)
class ResumePolicy:
    """What a session may do with a study that exists already. The text below an option is its help."""

    resume: Annotated[bool, RESUMING] = False
    """Resume a study from its finished records: --trials 100 after 40 adds 60 (after the test stories have been scored,
    together with --confirm 0 or --look-again). Options you omit are taken from the study; options that define it must
    not change. Machine options are taken from the study where the machines allow them."""
    force_resume: Annotated[bool, RESUMING] = False
    """Like --resume, even if data, stories, space, model, settings, code or versions changed; study.json records the
    changes."""
    take_over: Annotated[bool, RESUMING] = False
    """With --resume, in object storage: take the study from a run that seems to be at work on it; study.json records
    this."""
    look_again: Annotated[bool, RESUMING] = False
    """Score the test stories although this study, or another one in the same place, has used them; confirm.json
    records this."""

    @property
    def resumes(self) -> bool:
        return self.resume or self.force_resume
