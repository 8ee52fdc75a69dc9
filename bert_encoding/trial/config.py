"""The settings of one trial, and their checks."""

from dataclasses import dataclass, field, fields
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


def _choice(default: str, allowed: tuple[str, ...]) -> Any:
    def check(name: str, value: object) -> None:
        if value not in allowed:
            raise InputError(f"{name} {value!r}: must be one of {', '.join(allowed)}")

    return field(default=default, metadata={"check": check})


def _flag(default: bool) -> Any:
    def check(name: str, value: object) -> None:
        if not isinstance(value, bool):
            raise InputError(f"{name} {value!r}: must be True or False")

    return field(default=default, metadata={"check": check})


def _whole(default: int | None, lowest: int, highest: int) -> Any:
    """Return a whole number; None is allowed if it is the default."""

    def check(name: str, value: object) -> None:
        if value is None and default is None:
            return
        if isinstance(value, bool) or not isinstance(value, int):
            raise InputError(f"{name} {value!r}: must be a whole number")
        _check_number(name, value, lowest, highest)

    return field(default=default, metadata={"check": check})


def _number(default: float | None, lowest: float, highest: float, *, zero: bool = True, optional: bool = False) -> Any:
    """Return a number; None is allowed if it is the default or ``optional``."""

    def check(name: str, value: object) -> None:
        if value is None and (optional or default is None):
            return
        _check_number(name, value, lowest, highest)
        if value == 0 and not zero:
            raise InputError(f"{name} 0: must be above 0")

    return field(default=default, metadata={"check": check})


def _check_number(name: str, value: object, lowest: float, highest: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not lowest <= value <= highest:
        raise InputError(f"{name} {value!r}: must be a number from {lowest:g} to {highest:g}")


@dataclass(frozen=True)
class TrialConfig:
    """The settings of one trial, flat as in records and search spaces; docs/fine_tuning.md explains every field.

    InputError names a value that is not allowed, or does not go with another one.
    """

    method: str = _choice(LORA, METHODS)
    model: str = "bert-base-uncased"  # ``minilm``, ``minilm-plain``, a folder or a hub name
    layer: int | tuple[int, ...] | None = None  # whose hidden states are the word vectors; None is the last
    keep_layers: bool = _flag(False)  # ``frozen`` embeds all layers in one pass and caches them
    seed: int = _whole(0, 0, 2**62)

    # which weights train
    rank: int = _whole(8, 1, 4096)
    lora_alpha: float = _number(16.0, 0, 1e6, zero=False)  # the update is scaled by lora_alpha / rank
    target_modules: str = "q,v"
    lora_dropout: float = _number(0.1, 0, 0.99)
    lora_scaling: str = _choice("standard", ("standard", "rslora"))
    lora_init: str = _choice("zero", ("zero", "gaussian", "pissa", "olora"))
    lora_bias: str = _choice("none", ("none", "lora_only"))
    lora_layers: tuple[int, ...] | None = None  # None is all blocks
    dora: bool = _flag(False)
    train_embeddings: bool = _flag(True)  # with ``full``
    frozen_blocks: int = _whole(6, 0, 1000)  # with ``partial``

    # the objective, AdamW and its schedule
    objective: str = _choice("mlm", ("mlm", "mlm_nsp"))
    whole_words: bool = _flag(False)
    lr: float = _number(2e-4, 0, 1, zero=False)
    epochs: int = _whole(3, 1, 1000)
    batch_size: int = _whole(8, 1, 4096)  # windows
    accumulation: int = _whole(1, 1, 4096)
    weight_decay: float = _number(0.01, 0, 10)
    max_grad_norm: float = _number(1.0, 0, 1e9, zero=False)
    schedule: str = _choice("constant", SCHEDULES)
    warmup_epochs: float = _number(0.3, 0, 1000)
    patience: int | None = _whole(None, 1, 1000)  # epochs; None never stops early
    l2_sp: float = _number(0.0, 0, 1e6)
    replay: float = _number(0.0, 0, 0.9)  # share of general text
    match_steps: bool = _flag(False)

    # windows, in tokens with [CLS] and [SEP]
    stride: int = _whole(256, 1, 1_000_000)
    window_tokens: int = _whole(512, 8, 1_000_000)
    embed_stride: int = _whole(256, 1, 1_000_000)
    embed_window_tokens: int = _whole(512, 8, 1_000_000)
    mask_probability: float = _number(0.15, 0, 0.9, zero=False)
    mlm_text: str = _choice("fit", MLM_TEXTS)
    hidden_dropout: float | None = _number(None, 0, 0.99)  # None is the checkpoint's
    attention_dropout: float | None = _number(0.0, 0, 0.99, optional=True)  # 0 allows the fused attention kernel
    precision: str = _choice("auto", PRECISIONS)
    embed_precision: str = _choice("auto", PRECISIONS)
    score_every: int = _whole(1, 1, 1000)  # epochs

    # the encoding model, and features without BERT
    delays: tuple[int, ...] = (1, 2, 3, 4)  # TRs
    ridge_alphas: tuple[float, ...] = RIDGE_ALPHAS
    n_folds: int = _whole(5, 3, 1000)  # predicting one fold leaves two on which ridge_alphas are chosen
    probe_tokens: int = _whole(2000, 1, 1_000_000_000)  # masked tokens, at most, on which losses are read
    vocabulary: int = _whole(1000, 1, 100_000)  # of the bag of words
    static_vectors: str = ""  # file of GloVe or word2vec vectors

    def __post_init__(self) -> None:
        for setting in fields(self):
            if "check" in setting.metadata:
                setting.metadata["check"](setting.name, getattr(self, setting.name))
        if not self.model or not isinstance(self.model, str):
            raise InputError(f"model {self.model!r}: must be a name or a folder")
        _check_layers("layer", self.layer)
        _check_layers("lora_layers", self.lora_layers)
        self._check_objective()
        if (self.method == STATIC) != bool(self.static_vectors) or not isinstance(self.static_vectors, str):
            raise InputError(f"static_vectors {self.static_vectors!r}: a file for method {STATIC}, and for no other")
        target_regex(self.target_modules)
        _check_number("stride", self.stride, 1, self.window_tokens - 2)
        _check_number("embed_stride", self.embed_stride, 1, self.embed_window_tokens - 2)
        delays = self.delays
        if not delays or any(type(d) is not int or d < 0 for d in delays) or len(set(delays)) < len(delays):
            raise InputError(f"delays {delays!r}: must be different whole TRs from 0 up")
        if not self.ridge_alphas or not all(0 < ridge_alpha < float("inf") for ridge_alpha in self.ridge_alphas):
            raise InputError(f"ridge_alphas {self.ridge_alphas!r}: must be finite and above 0")
        if any(lower >= higher for lower, higher in pairwise(self.ridge_alphas)):
            raise InputError(f"ridge_alphas {self.ridge_alphas!r}: must ascend, each once")

    def _check_objective(self) -> None:
        """Refuse settings that would have no effect, or not the one that their names state."""
        for name, value in (("mlm_text", "fit"), ("replay", 0), ("match_steps", False)):
            setting = getattr(self, name)
            if self.objective == "mlm_nsp" and setting != value:
                raise InputError(f"{name} {setting!r}: not with objective 'mlm_nsp'; leave it {value!r}")
        if self.patience is not None and self.score_every > 1:
            raise InputError(f"score_every {self.score_every}: with patience every epoch must be scored; leave it 1")
        if self.patience is not None and self.mlm_text == "all":
            raise InputError("patience: with mlm_text 'all' no story is held out to stop by; leave it None")

    @property
    def training(self) -> Training:
        """The settings of the training loop."""
        return Training(**{setting.name: getattr(self, setting.name) for setting in fields(Training)})

    @property
    def tuning(self) -> TuningConfig:
        """The settings of the method: which weights train, and how."""
        return TuningConfig(**{setting.name: getattr(self, setting.name) for setting in fields(TuningConfig)})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrialConfig":
        """Build a configuration from plain values, as a record or a search space has them; check names and values."""
        settings = {setting.name for setting in fields(cls)}
        for name in values:
            if name not in settings:
                raise InputError(f"{name!r} is no setting of a trial; settings are {', '.join(sorted(settings))}")
        tuples: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**tuples)


# Values for records and studies that are older than these settings.
OLDER_SETTINGS: dict[str, Any] = {"embed_precision": "float32", "score_every": 1}


def _check_layers(name: str, value: object) -> None:
    """Refuse what is not None, a number, or several different numbers."""
    several = value if isinstance(value, tuple) else () if value is None else (value,)
    if value == () or any(type(layer) is not int or not 0 <= layer <= 1000 for layer in several):
        raise InputError(f"{name} {value!r}: must be a whole number from 0 to 1000, or several")
    if len(set(several)) < len(several):
        raise InputError(f"{name} {value!r}: a layer is named twice")
    if name == "lora_layers" and isinstance(value, int):
        raise InputError(f"{name} {value!r}: must be several, such as ({value},)")
