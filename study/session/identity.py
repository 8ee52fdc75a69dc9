"""The identity of a study: recorded in ``study.json``, compared on resume, and updated when that is forced."""

import importlib.metadata
import platform
import subprocess
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bert_encoding.core.devices import pick_device, resolve_precision
from bert_encoding.core.errors import InputError
from bert_encoding.core.files import code_fingerprint, read_json, write_json
from bert_encoding.core.names import ENCODING, STUDY_FILE
from bert_encoding.core.storage import Place, open_place
from bert_encoding.language_model.encoder import BUNDLED, checkpoint_fingerprint
from bert_encoding.trial.config import OLDER_SETTINGS
from study.cluster.connect import ask_worker
from study.setup.resolve import options_record
from study.setup.text_study import AnyStudy

PACKAGES = ("ray", "torch", "transformers", "peft", "optuna", "numpy", "scipy", "pandas")


def git_commit() -> dict[str, Any] | None:
    """Return the commit of the source tree and whether it had changes; None outside a checkout.

    An installation can lie inside the repository of another project, which does not track it.
    """

    def git(*arguments: str) -> str:
        folder = Path(__file__).parent
        return subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return {"commit": git("rev-parse", "HEAD").strip(), "dirty": bool(git("status", "--porcelain").strip())}
    except (OSError, subprocess.CalledProcessError):
        return None


IDENTITY = ("options", "space", "data", "voxels", "model", "splits", "config", "code", "precision", "versions")
OF_THE_BEGINNING = ("name", "created", "command_line")  # a resumed study keeps these
THE_TASK, THE_VOXELS, THE_PRECISION = "the task", "the voxels", "the precision of this machine"


class Difference(NamedTuple):
    """A property of a study that differs from its record."""

    what: str
    before: str
    now: str

    def __str__(self) -> str:
        return f"{self.what} changed from {self.before} to {self.now}"


def identify(study: AnyStudy, task: Any, may_fetch: bool = True) -> dict[str, Any]:
    """Return the content of ``study.json``. What is not known yet is None: the weights of a model on the hub unless it
    ``may_fetch``, and the precision on a cluster's workers."""
    space, model, base = study.space, study.options.model, study.base
    at_hand = may_fetch or model in BUNDLED or Path(model).is_dir()
    here = study.options.machines.is_local or base.precision != "auto"
    device = pick_device() if study.options.gpus_per_trial else torch.device("cpu")
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command_line": sys.argv,
        "code": code_fingerprint(),
        "git": git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "name": study.options.name,
        "task": space.task,
        "space": {"name": space.name, "hash": space.source_hash, "source": space.path.read_text()},
        "model": {"name": model, "weights": checkpoint_fingerprint(model) if at_hand else None},
        "config": asdict(base),
        "precision": resolve_precision(base.precision, device) if here else None,
        "options": options_record(study.options),
        **study.about(task),
    }


def differences(recorded: dict[str, Any], identity: dict[str, Any]) -> list[Difference]:
    """Return the changes that are not allowed; more trials and moved data are allowed."""
    before, now = _comparable(recorded), _comparable(identity)
    if recorded["data"]["fingerprint"] == identity["data"]["fingerprint"]:
        before["the data"] = now["the data"]
    if identity["model"]["weights"] is None and recorded["model"]["name"] == identity["model"]["name"]:
        before["the model"] = now["the model"]
    if None in (recorded["precision"], identity["precision"]):
        before[THE_PRECISION] = now[THE_PRECISION]
    return [Difference(what, str(before.get(what)), now[what]) for what in now if before.get(what) != now[what]]


def read_identity(folder: Place, identity: dict[str, Any]) -> dict[str, Any]:
    """Return the content of ``study.json``, which must have all entries that ``identity`` is compared with."""
    return read_json(folder / STUDY_FILE, required=tuple(name for name in identity if name in IDENTITY))


def resumed(
    folder: Place, recorded: dict[str, Any], identity: dict[str, Any], may_force: bool, first_trial: str
) -> dict[str, Any]:
    """Return the new content of ``study.json`` of a resumed study, whose next trial is ``first_trial``.

    Raises InputError, naming the first difference, if there is one and it may not be forced.
    """
    changes = differences(recorded, identity)
    _check(folder, changes, may_force)
    if not changes:
        moved = {"data": recorded["data"] | {"source": identity["data"]["source"]}, "options": identity["options"]}
        return recorded | moved | ({} if recorded["precision"] else {"precision": identity["precision"]})
    unchanged = {*OF_THE_BEGINNING, *(name for name in ("precision",) if identity[name] is None)}
    if THE_VOXELS not in (change.what for change in changes):
        unchanged.add("voxels")  # with the key of those that the study chose
    updates = {name: value for name, value in identity.items() if name not in unchanged and recorded.get(name) != value}
    was = {name: recorded[name] for name in updates if name in recorded}
    return record_force(recorded | updates, changes, was, first_trial)


def record_force(
    recorded: dict[str, Any], changes: list[Difference], was: dict[str, Any], first_trial: str
) -> dict[str, Any]:
    """Return ``study.json`` with an entry for a study that was resumed although it differs.

    ``was`` is the earlier content where it differs, ``first_trial`` the first one that runs under the new content.
    """
    forced = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "first_trial": first_trial,
        "differences": [change._asdict() for change in changes],
        "was": was,
    }
    return recorded | {"forced": [*recorded.get("forced", []), forced]}


def settle_precision(study: AnyStudy, folder: Place, may_force: bool, first_trial: str) -> None:
    """Record the precision of matrix products on a cluster's workers, which must stay the same; needs Ray.

    Raises InputError if finished trials used another one, unless that may be forced, or a worker cannot read the study.
    """
    if study.options.machines.is_local:
        return
    options, recorded = study.options, read_json(folder / STUDY_FILE, required=("precision",))
    shares = (options.cpus_per_trial, options.gpus_per_trial)
    now = str(ask_worker(*shares, _look_around, study.base.precision, str(folder)))
    if recorded["precision"] == now:
        return
    settled = recorded | {"precision": now}
    if recorded["precision"] is not None:
        changes = [Difference(THE_PRECISION, str(recorded["precision"]), now)]
        _check(folder, changes, may_force)
        settled = record_force(settled, changes, {"precision": recorded["precision"]}, first_trial)
    write_json(folder / STUDY_FILE, settled)


def _look_around(precision: str, folder: str) -> str:
    """Return the precision here, and verify that this machine shares the study's folder."""
    if not (open_place(folder) / STUDY_FILE).is_file():
        raise InputError(
            f"{folder}: {platform.node()}, a machine of the cluster, does not see it; give an --out on a disk that all "
            "machines share, or s3://bucket/prefix"
        )
    return resolve_precision(precision, pick_device())


def _check(folder: Place, changes: list[Difference], may_force: bool) -> None:
    """Refuse to mix two studies; scores of two tasks and chosen voxels cannot be mixed even by force."""
    own = "give the recorded value, or begin a new study with another --name"
    never = [change for change in changes if change.what == THE_TASK or _changes_chosen_voxels(change)]
    if never and may_force:
        raise InputError(f"{folder}: cannot resume, even by force: {never[0]}; {own}")
    if changes and not may_force:
        others = ", ".join(change.what for change in changes[1:])
        also = f"; also changed: {others}" if others else ""
        raise InputError(f"{folder}: cannot resume: {changes[0]}; {own}, or resume with --force-resume{also}")


def _changes_chosen_voxels(change: Difference) -> bool:
    return change.what == THE_VOXELS and (change.before.isdecimal() or change.now.isdecimal())


def _comparable(identity: dict[str, Any]) -> dict[str, str]:
    """Return the properties that must not change, as texts."""
    stories = {
        f"the {role} stories" + (f" of outer fold {fold}" if len(identity["splits"]) > 1 else ""): ", ".join(names)
        for fold, split in enumerate(identity["splits"])
        for role, names in split.items()
    }
    voxels = str(identity["voxels"]["asked"])  # those that the study chose are checked when they are read
    config = OLDER_SETTINGS | identity["config"]
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in config.items()}
    return {
        THE_TASK: str(identity.get("task", ENCODING)),
        "the search space": f"{identity['space']['name']} ({identity['space']['hash']})",
        "the data": f"{identity['data']['source']} ({identity['data']['fingerprint']})",
        "the trim": str(identity["data"].get("trim_trs")),
        THE_VOXELS: voxels if voxels.isdecimal() else f"{Path(voxels).name} ({identity['voxels']['key']})",
        "the text that is not stories": str(identity.get("general_text")),
        "the model": f"{identity['model']['name']} ({identity['model']['weights']})",
        "the code of bert_encoding": str(identity["code"]),
        THE_PRECISION: str(identity["precision"]),
        **{f"the version of {name}": version for name, version in identity["versions"].items()},
        "the number of outer folds": str(len(identity["splits"])),
        **stories,
        **{f"the setting {name}": str(value) for name, value in settings.items()},
    }
