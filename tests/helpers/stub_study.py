"""A study whose trials only pretend, on real Ray processes: python stub_study.py FOLDER OPTIONS; prints why it ended.

Its learning rate decides what a trial does, see ``pretend``. The driver, the workers and the records are real; but
workers import no torch, so that many of them fit here and what they cost is Ray's and ours.
"""

import json
import os
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from rich.console import Console

from bert_encoding.core.files import content_key
from bert_encoding.core.names import COMPLETE, STOPPED
from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.record import TrialRecord, read_records
from study.cluster.connect import connect, local_ray
from study.cluster.lock import Hold, holding
from study.cluster.machines import Machines, Node
from study.setup.spaces import load_space

SLEEPS, HOLDS_THE_INTERPRETER, DIES_ONCE, FAILS, FREEZES = 0.101, 0.202, 0.404, 0.505, 0.606
WAITS_ONCE, FILLS_MEMORY = 0.707, 0.818
FILLS_ITS_DISK, FILLS_EVERY_DISK = 0.828, 0.838  # a worker cannot write the record; nor can the driver
MAX_BYTES = 200  # of a file, where no more can be written
LOG, WAITING = "log", "waiting.json"
OPTIONS = {
    **{"scheduler": "none", "name": "stub", "seed": 0, "epochs": 4, "trial_timeout": None, "tensorboard": False},
    **{"cpus_per_trial": 1, "gpus_per_trial": 0, "max_concurrent": 2},
    **{"cpus": 4, "seconds": 0.0, "nodes": 0},  # of this stub alone
}


def pretend(given: dict[str, Any], folder: Path, report: Any) -> TrialRecord:
    """Misbehave at some learning rates; at others reach a CC of lr * epoch."""
    config = SimpleNamespace(**given)
    with open(folder / LOG, "a") as log:  # a line this short is written at once
        log.write(f"{config.lr} {os.getpid()}\n")
    if config.lr == WAITS_ONCE and not (folder / WAITING).exists():
        wait_for_the_end(folder / WAITING)
    if config.lr == FILLS_MEMORY:
        fill_memory()
    if config.lr == SLEEPS:
        time.sleep(10_000)
    if config.lr == HOLDS_THE_INTERPRETER:
        re.match("(a+)+$", "a" * 60 + "b")
    if config.lr == DIES_ONCE and not (folder / "died").exists():
        (folder / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if config.lr == FREEZES:
        os.kill(os.getpid(), signal.SIGSTOP)
    if config.lr == FAILS:
        raise FloatingPointError("the loss is not finite")
    time.sleep(float(os.environ.get("STUB_SECONDS", 0)))
    epochs: list[dict[str, float]] = []
    status = COMPLETE
    for epoch in range(1, config.epochs + 1):
        epochs.append({"epoch": float(epoch), "cc_mean": config.lr * epoch})
        if not report(epochs[-1]) and epoch < config.epochs:
            status = STOPPED
            break
    scores = {"cc_mean": epochs[-1]["cc_mean"], "epochs_done": epochs[-1]["epoch"], "worker": os.getpid()}
    scores["has_torch"] = "torch" in sys.modules
    return TrialRecord(status, "lora", given, scores=scores, epochs=epochs)


def wait_for_the_end(file: Path) -> None:
    """Say which process on which node this is, and wait to be killed."""
    import ray

    half = file.with_suffix(".half")
    half.write_text(json.dumps({"pid": os.getpid(), "node": ray.get_runtime_context().get_node_id()}))
    half.rename(file)
    time.sleep(10_000)


def fill_memory() -> None:
    """Ask for more than the process may have, as much as it has and 200 MB; the limit is lifted again."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 200_000_000, before[1]))
    try:
        bytearray(1_000_000_000)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def where_full(write: Any, learning_rates: tuple[float, ...]) -> Any:
    """Return ``write_record`` for a disk that is full when a trial with one of these learning rates is written."""

    def write_record(folder: Path, record: TrialRecord) -> None:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        if record.config["lr"] in learning_rates:
            resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_BYTES, before[1]))
        try:
            write(folder, record)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return write_record


def stub_objective(
    job: dict[str, Any], *, task: Any, study: str, metric: Any, n_threads: int, gpu_share: float, stop_signal: Any
) -> None:
    """The worker's own function, with a trial that pretends."""
    settings = ModuleType("bert_encoding.trial.config")  # the real one imports torch
    settings.TrialConfig = dict  # type: ignore[attr-defined]
    sys.modules.setdefault(settings.__name__, settings)
    import bert_encoding.trial.record
    import study.search.worker as module

    module._limit_resources = lambda *limits: None  # it imports torch
    module._run = lambda made, task, folder, report, cache: pretend(made.config, folder, report)
    module.write_record = where_full(bert_encoding.trial.record.write_record, (FILLS_ITS_DISK, FILLS_EVERY_DISK))
    module.objective(
        job, task=task, study=study, metric=metric, n_threads=n_threads, gpu_share=gpu_share, stop_signal=stop_signal
    )


@contextmanager
def three_nodes(folder: Path, n_cpus: int) -> Iterator[Path]:
    """Ray on three nodes of ``n_cpus`` each, the head's being 0; the one where a trial waits is lost without grace."""
    os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN_PATH"] = "token", str(folder / "auth_token")
    os.environ["RAY_TMPDIR"] = os.environ["TMPDIR"]
    (folder / "auth_token").touch(mode=0o600)
    (folder / "auth_token").write_text("0123456789abcdef" * 4)
    from ray.cluster_utils import Cluster

    common = {"object_store_memory": 80_000_000}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **common})
    nodes = [cluster.add_node(num_cpus=n_cpus, **common) for _ in range(2)]

    def lose() -> None:
        while not (folder / WAITING).exists():
            time.sleep(0.05)
        where = json.loads((folder / WAITING).read_text())["node"]
        cluster.remove_node(next(node for node in nodes if node.node_id == where), allow_graceful=False)
        print(f"lost {where}", flush=True)

    threading.Thread(target=lose, daemon=True).start()
    try:
        with connect(Machines(cluster.address, "test", (Node(0, 0), *[Node(n_cpus, 0)] * 2))) as private:
            yield private
    finally:
        cluster.shutdown()


def main(folder: Path, given: dict[str, Any]) -> None:
    options = SimpleNamespace(**OPTIONS | given, folder=folder)
    os.environ["STUB_SECONDS"] = str(options.seconds)
    space = load_space(str(folder / "space.py"))
    base = TrialConfig(model="none", epochs=options.epochs)
    (folder / "trials").mkdir(exist_ok=True)
    stub = SimpleNamespace(options=options, space=space, base=base)
    machines = three_nodes(folder, options.cpus) if options.nodes else local_ray(options.cpus, 0)
    with holding(folder, Hold()), machines as private:
        import study.search.time_limits
        import study.search.tuning  # not before Ray's environment is set
        from study.session.session import _next_id

        study.search.tuning.objective = stub_objective
        study.search.time_limits.write_record = where_full(study.search.time_limits.write_record, (FILLS_EVERY_DISK,))
        key_of, first_id = lambda config: content_key(asdict(config)), _next_id(folder)
        about = (read_records(folder), [], key_of, first_id)
        error = study.search.tuning.run_search(stub, None, *about, private, Console(width=400))
    print(f"ended: {error}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
