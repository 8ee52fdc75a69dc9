"""The voxels of a study, chosen once and stored in its folder."""

from rich.console import Console

from bert_encoding.core.errors import InputError
from bert_encoding.core.files import read_json, write_json
from bert_encoding.core.names import STUDY_FILE
from bert_encoding.core.storage import Place, atomic_path, local_copy
from bert_encoding.trial.pipeline import Task
from bert_encoding.trial.voxel_selection import keep_voxels, read_voxels, voxels_key, write_voxels
from study.cluster.connect import ask_worker
from study.search.worker import choose
from study.setup.encoding_study import Study

VOXELS_FILE = "voxels.npz"


def on_chosen_voxels(study: Study, task: Task, folder: Place, console: Console) -> Task:
    """Return the task on the study's voxels, which are chosen on a worker the first time; needs Ray.

    Raises InputError if the stored voxels are damaged or are not those of the finished trials.
    """
    options = study.options
    if not options.voxels.isdecimal():
        return task
    file = folder / VOXELS_FILE
    if not file.exists():
        console.print(f"choosing {options.voxels} voxels by the frozen encoder's CC inside the fit stories ...")
        with atomic_path(file) as temporary:
            shares = (options.cpus_per_trial, options.gpus_per_trial)
            chosen_by = (study.base, task, int(options.voxels), max(1, int(shares[0])), shares[1])
            write_voxels(temporary, ask_worker(*shares, choose, *chosen_by))
    with local_copy(file) as copy:
        voxels = read_voxels(copy, task.dataset)
    chosen = task._replace(dataset=keep_voxels(task.dataset, voxels), voxels_are_chosen=True)
    _check_voxels(folder, file, voxels_key(chosen.dataset))
    return chosen


def _check_voxels(folder: Place, file: Place, key: str) -> None:
    """Record the voxels in ``study.json`` when they are chosen; later they must be the same."""
    identity = read_json(folder / STUDY_FILE, required=("voxels",))
    recorded = identity["voxels"].get("key")
    if recorded is None:
        write_json(folder / STUDY_FILE, identity | {"voxels": identity["voxels"] | {"key": key}})
    elif recorded != key:
        raise InputError(f"{file}: not the voxels on which this study's trials were scored; put the old file back")
