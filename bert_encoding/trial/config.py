"""What one trial does: every setting, checked."""

from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

from bert_encoding.core.devices import PRECISIONS
from bert_encoding.core.errors import InputError
from bert_encoding.core.names import BAG_OF_WORDS, BERT_METHODS, LORA, STATIC, WORD_RATE
from bert_encoding.language_model.finetuning_methods import TuningConfig
from bert_encoding.language_model.lora import target_regex
from bert_encoding.language_model.training import SCHEDULES, Training
from bert_encoding.regression.ridge import RIDGE_ALPHAS

METHODS = (WORD_RATE, BAG_OF_WORDS, STATIC, *BERT_METHODS)
MLM_TEXTS = ("fit", "all", "control")
OBJECTIVES = ("mlm", "mlm_nsp")
LORA_SCALINGS = ("standard", "rslora")
LORA_INITS = ("zero", "gaussian", "pissa", "olora")
LORA_BIASES = ("none", "lora_only")


@dataclass(frozen=True)
class TrialConfig:
    """The settings of one trial; a search space may set each of them.

    Attributes
    ----------
    method : ``lora``, ``full`` (all weights), ``partial`` (all but the embeddings and the first blocks), ``frozen``
        (the base model as it is), ``random`` (its architecture with weights drawn anew, frozen); without BERT
        ``word_rate``, ``bag_of_words`` or ``static``
    model : ``minilm``, ``minilm-plain``, a folder or a hub name
    keep_layers : of ``frozen``: embed with all layers in one pass and keep them for the next trials
    layer : whose hidden states are the word vectors; None is the last, several (4, 5, 6) are averaged
    seed : of everything random in the trial
    rank, lora_alpha, target_modules, lora_dropout : the adapter; the update is scaled by lora_alpha / rank
    lora_scaling : ``standard``, or ``rslora``: lora_alpha / sqrt(rank)
    lora_init : ``zero`` (B starts at 0), ``gaussian``, ``pissa`` or ``olora`` (both rewrite the base weights)
    lora_bias : ``none``, or ``lora_only`` to train the biases of adapted modules too
    lora_layers : blocks that get an adapter, from 0; None is all
    dora : weight-decomposed LoRA
    train_embeddings : ``full`` trains the word, position and segment embeddings too
    frozen_blocks : ``partial`` keeps the embeddings and so many first blocks
    objective : ``mlm``, or ``mlm_nsp``: with next-sentence prediction
    whole_words : mask all pieces of a chosen word
    lr, epochs, batch_size, accumulation, weight_decay, max_grad_norm : AdamW; batch_size counts windows
    schedule, warmup_epochs : ``constant``, ``linear`` or ``cosine`` after a warm-up of so many epochs
    patience : stop after so many epochs without a lower held-out loss (in a classification: a higher accuracy) and
        restore the best epoch; None never does
    l2_sp : penalty l2_sp / 2 * ||W - W_pretrained||^2 on what is trained
    replay : share of the windows of a step that are general text, against forgetting
    match_steps : train as many steps an epoch as non-overlapping windows would give, whatever the stride
    window_tokens, stride : length of a training window with [CLS] and [SEP], and tokens from one start to the next
    embed_window_tokens, embed_stride : the same for embedding windows; leave them equal in all trials and baselines
    mask_probability : share of tokens to predict
    mlm_text : ``fit`` stories alone, ``all`` stories (the words of validation and test included), or ``control``: as
        many tokens of unrelated text
    hidden_dropout, attention_dropout : of the base model while training; None leaves the checkpoint's own.
        Attention dropout is off, for the fused attention kernel (docs/statistics.md)
    precision : of the fine-tuning's matrix products: ``auto`` is bfloat16 where the processor multiplies it natively
    embed_precision : of the products that make word vectors, the same choices; settled once for a study;
        ``float32`` for effects below 5e-4 (docs/statistics.md)
    score_every : score CC after every so many epochs and after the last one; losses are read after each
    delays : FIR delays in TRs
    ridge_alphas, n_folds : penalties, and story folds inside fit that choose among them
    probe_tokens : masked tokens at most on which losses are read
    vocabulary : size of the bag of words, the most frequent of the fit stories
    static_vectors : file of GloVe or word2vec vectors, for ``static``
    """

    method: str = LORA
    model: str = "bert-base-uncased"
    layer: int | tuple[int, ...] | None = None
    keep_layers: bool = False
    seed: int = 0
    rank: int = 8
    lora_alpha: float = 16.0
    target_modules: str = "q,v"
    lora_dropout: float = 0.1
    lora_scaling: str = "standard"
    lora_init: str = "zero"
    lora_bias: str = "none"
    lora_layers: tuple[int, ...] | None = None
    dora: bool = False
    train_embeddings: bool = True
    frozen_blocks: int = 6
    objective: str = "mlm"
    whole_words: bool = False
    lr: float = 2e-4
    epochs: int = 3
    batch_size: int = 8
    accumulation: int = 1
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    schedule: str = "constant"
    warmup_epochs: float = 0.3
    patience: int | None = None
    l2_sp: float = 0.0
    replay: float = 0.0
    match_steps: bool = False
    stride: int = 256
    window_tokens: int = 512
    embed_stride: int = 256
    embed_window_tokens: int = 512
    mask_probability: float = 0.15
    mlm_text: str = "fit"
    hidden_dropout: float | None = None
    attention_dropout: float | None = 0.0
    precision: str = "auto"
    embed_precision: str = "auto"
    score_every: int = 1
    delays: tuple[int, ...] = (1, 2, 3, 4)
    ridge_alphas: tuple[float, ...] = RIDGE_ALPHAS
    n_folds: int = 5
    probe_tokens: int = 2000
    vocabulary: int = 1000
    static_vectors: str = ""

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} {getattr(self, name)!r}: must be one of {', '.join(allowed)}")
        if not self.model or not isinstance(self.model, str):
            raise InputError(f"model {self.model!r}: must be a name or a folder")
        for name in (*_WHOLE, *(["patience"] if self.patience is not None else [])):
            if isinstance(getattr(self, name), bool) or not isinstance(getattr(self, name), int):
                raise InputError(f"{name} {getattr(self, name)!r}: must be a whole number")
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} {getattr(self, name)!r}: must be True or False")
        for name in ("layer", "lora_layers"):
            _check_layers(name, getattr(self, name))
        for name, lowest, highest in _RANGES:
            _check_range(name, getattr(self, name), lowest, highest)
        for name in ("lr", "lora_alpha", "max_grad_norm", "mask_probability"):
            if getattr(self, name) == 0:
                raise InputError(f"{name} 0: must be above 0")
        self._check_objective()
        if (self.method == STATIC) != bool(self.static_vectors) or not isinstance(self.static_vectors, str):
            raise InputError(f"static_vectors {self.static_vectors!r}: a file for method {STATIC}, and for no other")
        target_regex(self.target_modules)
        _check_range("stride", self.stride, 1, self.window_tokens - 2)
        _check_range("embed_stride", self.embed_stride, 1, self.embed_window_tokens - 2)
        if not self.delays or any(type(d) is not int or d < 0 for d in self.delays) or not _differ(self.delays):
            raise InputError(f"delays {self.delays!r}: must be different whole TRs from 0 up")
        if not self.ridge_alphas or not all(0 < alpha < float("inf") for alpha in self.ridge_alphas):
            raise InputError(f"ridge_alphas {self.ridge_alphas!r}: must be finite and above 0")
        if any(one >= other for one, other in pairwise(self.ridge_alphas)):
            raise InputError(f"ridge_alphas {self.ridge_alphas!r}: must ascend, each once")

    def _check_objective(self) -> None:
        """Refuse settings that would do nothing, or not what their names say."""
        if self.objective == "mlm_nsp":
            for name, value in (("mlm_text", "fit"), ("replay", 0), ("match_steps", False)):
                if getattr(self, name) != value:
                    raise InputError(
                        f"{name} {getattr(self, name)!r}: not with objective 'mlm_nsp'; leave it {value!r}"
                    )
        if self.patience is not None and self.score_every > 1:
            raise InputError(
                f"score_every {self.score_every}: with patience any epoch may be the one that counts; leave it 1"
            )
        if self.patience is not None and self.mlm_text == "all":
            raise InputError("patience: with mlm_text 'all' no story is held out to stop by; leave it None")

    @property
    def training(self) -> Training:
        """The settings of the training loop."""
        return Training(**{field.name: getattr(self, field.name) for field in fields(Training)})

    @property
    def tuning(self) -> TuningConfig:
        """The settings of the method: which weights train, and how."""
        return TuningConfig(**{field.name: getattr(self, field.name) for field in fields(TuningConfig)})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrialConfig":
        """Build a configuration from plain values, as a record or a search space has them.

        Raises
        ------
        InputError
            if a name is no setting or a value is not allowed.
        """
        known = {field.name for field in fields(cls)}
        for name in values:
            if name not in known:
                raise InputError(f"{name!r} is no setting of a trial; settings are {', '.join(sorted(known))}")
        tuples: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**tuples)


# What trials did before these could be set: for records and studies that do not name them.
OLDER_SETTINGS: dict[str, Any] = {"embed_precision": "float32", "score_every": 1}

CHOICES = {
    "method": METHODS,
    "schedule": SCHEDULES,
    "mlm_text": MLM_TEXTS,
    "precision": PRECISIONS,
    "embed_precision": PRECISIONS,
    "objective": OBJECTIVES,
    "lora_scaling": LORA_SCALINGS,
    "lora_init": LORA_INITS,
    "lora_bias": LORA_BIASES,
}
_FLAGS = ("keep_layers", "dora", "train_embeddings", "whole_words", "match_steps")
_OPTIONAL = ("layer", "hidden_dropout", "attention_dropout", "patience")
_WHOLE = (
    "rank",
    "epochs",
    "score_every",
    "batch_size",
    "accumulation",
    "stride",
    "embed_stride",
    "window_tokens",
    "embed_window_tokens",
    "n_folds",
    "seed",
    "probe_tokens",
    "vocabulary",
    "frozen_blocks",
)
_RANGES: tuple[tuple[str, float, float], ...] = (
    ("rank", 1, 4096),
    ("lora_alpha", 0, 1e6),
    ("lora_dropout", 0, 0.99),
    ("lr", 0, 1),
    ("epochs", 1, 1000),
    ("score_every", 1, 1000),
    ("batch_size", 1, 4096),
    ("accumulation", 1, 4096),
    ("weight_decay", 0, 10),
    ("max_grad_norm", 0, 1e9),
    ("warmup_epochs", 0, 1000),
    ("window_tokens", 8, 1_000_000),
    ("embed_window_tokens", 8, 1_000_000),
    ("mask_probability", 0, 0.9),
    ("hidden_dropout", 0, 0.99),
    ("attention_dropout", 0, 0.99),
    ("n_folds", 3, 1000),  # predicting one fold leaves two on which alphas are chosen
    ("probe_tokens", 1, 1_000_000_000),
    ("vocabulary", 1, 100_000),
    ("frozen_blocks", 0, 1000),
    ("patience", 1, 1000),
    ("l2_sp", 0, 1e6),
    ("replay", 0, 0.9),
    ("seed", 0, 2**62),
)


def _check_layers(name: str, value: object) -> None:
    """Layers are None, a number, or several different ones."""
    several = value if isinstance(value, tuple) else () if value is None else (value,)
    if value == () or any(type(layer) is not int or not 0 <= layer <= 1000 for layer in several):
        raise InputError(f"{name} {value!r}: must be a whole number from 0 to 1000, or several")
    if len(set(several)) < len(several):
        raise InputError(f"{name} {value!r}: a layer is named twice")
    if name == "lora_layers" and isinstance(value, int):
        raise InputError(f"{name} {value!r}: must be several, such as ({value},)")


def _differ(values: tuple[int, ...]) -> bool:
    return len(set(values)) == len(values)


def _check_range(name: str, value: object, lowest: float, highest: float) -> None:
    if value is None and name in _OPTIONAL:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not lowest <= value <= highest:
        raise InputError(f"{name} {value!r}: must be a number from {lowest:g} to {highest:g}")
