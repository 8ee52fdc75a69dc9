"""How the value of one option is read: as the user writes it, or as a study recorded it."""

from pathlib import Path

from bert_encoding.core.command_line import absolute
from bert_encoding.core.errors import InputError
from bert_encoding.core.names import BAG_OF_WORDS, DEMOS, RANDOM, STATIC
from bert_encoding.core.storage import Place, is_url, open_place
from bert_encoding.language_model.encoder import BUNDLED
from study.setup.options import ALL

EXTRA_BASELINES = (BAG_OF_WORDS, STATIC, RANDOM)


def flag(name: str) -> str:
    """Return an option as it is written on the command line."""
    return f"--{name.replace('_', '-')}"


def parse_data(name: str) -> str:
    """Return the name of a demo, or the absolute path of a folder or file."""
    return name if name in DEMOS else str(absolute("--data", name))


def parse_model(name: str) -> str:
    """Return a bundled name or one of the hub as it is, and the absolute path of a checkpoint on disk."""
    path = Path(name).expanduser()
    return str(path.resolve()) if name not in BUNDLED and path.exists() else name


def parse_out(location: str) -> Place:
    """Return where studies are stored: a URL of object storage, or the absolute path of a folder."""
    return open_place(location) if is_url(location) else absolute("--out", location)


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
    return parse_file("voxels", voxels)


def parse_file(option: str, name: str) -> str:
    """Return the absolute path of a file that exists; an empty name is no file."""
    if not name:
        return ""
    path = absolute(flag(option), name)
    if not path.is_file():
        raise InputError(f"{flag(option)} {name}: no such file")
    return str(path)


def parse_names(option: str, values: list[str] | None) -> list[str] | None:
    """Return the names of ``--subjects A B``, ``--subjects A --subjects B`` or ``--subjects A,B``."""
    names = [name for value in values or () for part in value.split(",") if (name := part.strip())]
    if values is not None and not names:
        raise InputError(f"{flag(option)}: name at least one, or leave the option out")
    return names or None


def parse_baselines(names: list[str], static_vectors: str) -> list[str]:
    """Return the further baselines, each once; a file of static vectors adds theirs."""
    chosen = [*(parse_names("baselines", names or None) or []), *([STATIC] if static_vectors else [])]
    for name in chosen:
        if name not in EXTRA_BASELINES:
            raise InputError(f"--baselines {name}: must be one of {', '.join(EXTRA_BASELINES)}")
    if STATIC in chosen and not static_vectors:
        raise InputError(f"--baselines {STATIC}: name the file of vectors with --static-vectors FILE")
    return list(dict.fromkeys(chosen))
