"""The values of single options: text checked and made into what it means, paths made absolute.

All of them raise ``InputError``, which names the option, for a value that cannot be.
"""

from pathlib import Path

from bert_encoding.command import absolute, parse_layer
from bert_encoding.encoders import BUNDLED
from bert_encoding.errors import InputError
from bert_encoding.records import BAG_OF_WORDS, RANDOM, STATIC
from bert_encoding.storage import Place, is_url, open_place

ALL = "all"
EXTRA_BASELINES = (BAG_OF_WORDS, STATIC, RANDOM)


def parse_model(name: str) -> str:
    """Return a bundled name or one of the hub as it is, and the absolute path of a checkpoint on disk."""
    path = Path(name).expanduser()
    return str(path.resolve()) if name not in BUNDLED and path.exists() else name


def parse_out(location: str) -> Place:
    """Return where studies are kept: a URL of object storage, or the absolute path of a folder."""
    return open_place(location) if is_url(location) else absolute("--out", location)


def parse_layers(layer: str | int | list[int] | None) -> int | tuple[int, ...] | None:
    """Return the layer that is given as text, or recorded as a number or several."""
    if isinstance(layer, list | tuple):
        return tuple(layer)
    return layer if isinstance(layer, int) else parse_layer(layer)


def parse_voxels(voxels: str) -> str:
    """Return ``all``, a number, or the absolute path of a file."""
    if voxels == ALL:
        return voxels
    if voxels.lstrip("+-").isdecimal():
        if int(voxels) < 1:
            raise InputError(f"--voxels {voxels}: must be at least 1, 'all', or a file")
        return str(int(voxels))
    if not voxels.endswith((".npy", ".npz")):
        raise InputError(f"--voxels {voxels}: give 'all', a number, or a file that ends in .npy or .npz")
    return parse_file("--voxels", voxels)


def parse_file(option: str, name: str) -> str:
    """Return the absolute path of a file that is there."""
    path = absolute(option, name)
    if not path.is_file():
        raise InputError(f"{option} {name}: no such file")
    return str(path)


def parse_names(values: list[str] | None) -> list[str] | None:
    """Accept ``--subjects A B``, ``--subjects A --subjects B`` and ``--subjects A,B``."""
    if values is not None and not any(part.strip() for value in values for part in value.split(",")):
        raise InputError("--subjects, --test-stories: name at least one, or leave the option out")
    names = [name for value in values or () for part in value.split(",") if (name := part.strip())]
    return names or None


def parse_baselines(names: list[str] | None, static_vectors: str) -> list[str]:
    """Return the further baselines, each once; a file of static vectors asks for theirs."""
    chosen = [*(parse_names(names or None) or []), *([STATIC] if static_vectors else [])]
    for name in chosen:
        if name not in EXTRA_BASELINES:
            raise InputError(f"--baselines {name}: must be one of {', '.join(EXTRA_BASELINES)}")
    if STATIC in chosen and not static_vectors:
        raise InputError(f"--baselines {STATIC}: name the file of vectors with --static-vectors FILE")
    return list(dict.fromkeys(chosen))
