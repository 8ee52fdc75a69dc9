"""Options: requested values override recorded ones, and these override defaults."""

import math
import os
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from bert_encoding.core.errors import InputError
from bert_encoding.core.files import write_json
from bert_encoding.trial.config import OLDER_SETTINGS
from study.cluster.machines import Machines, Node
from study.run import app
from study.session.identity import differences
from study.setup import machine_share
from study.setup.delta import delta_note
from study.setup.encoding_study import base_config
from study.setup.options import MEANINGS, STUDY, Options, ResumePolicy
from study.setup.resolve import check_take_over, check_task, options_record, read_recorded, resolve_options
from study.setup.spaces import Space, load_space

NAN, INF = math.nan, math.inf


@pytest.fixture(scope="module")
def smoke() -> Space:
    return load_space("smoke")


@pytest.fixture(autouse=True)
def _a_machine_of_four_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine(monkeypatch, 4, 0)
    monkeypatch.chdir(tmp_path)


def machine(monkeypatch: pytest.MonkeyPatch, n_cpus: int, n_gpus: int) -> None:
    """Imitate a machine with this many CPUs and GPUs."""
    use_machines(monkeypatch, Machines(None, "x", (Node(n_cpus, n_gpus),)))


def use_machines(monkeypatch: pytest.MonkeyPatch, machines: Machines) -> None:
    monkeypatch.setattr(machine_share, "find_machines", lambda address: machines)


def resolve(space: Space, recorded: dict[str, Any] | None = None, **requested: Any) -> Options:
    return resolve_options({"space": "smoke"} | requested, recorded or {}, space)


def test_defaults_of_the_demo(smoke: Space, tmp_path: Path) -> None:
    expected = {
        **{"space": "smoke", "data": "demo", "model": "minilm", "trim": "published", "trust_alignment": False},
        **{"voxels": "all", "trials": 2, "epochs": 1, "seed": 0, "sampler": "tpe", "scheduler": "none"},
        **{"name": f"smoke-{date.today():%Y-%m-%d}", "out": str(tmp_path / "results"), "outer_folds": 1},
        **{"mlm_text": "fit", "baselines": [], "static_vectors": "", "probe": "", "control_text": "", "clean": False},
        **dict.fromkeys(("layer", "subjects", "train_stories", "test_stories", "trial_timeout")),
        **dict.fromkeys(("train_examples", "examples", "max_length")),
        **{"cpus_per_trial": 2.0, "gpus_per_trial": 0.0, "max_concurrent": 2, "tensorboard": False},
        **{"keep_adapters": 5, "machines": Machines(None, "x", (Node(4, 0),)), "address": None, "requested": {}},
        **{"confirm": 3, "confirm_seeds": 2, "delta": 0.002, "deltas_before": []},
        **{"embed_precision": "auto", "score_every": 1},
    }
    assert vars(resolve(smoke)) == expected


def test_real_data_get_bert_base_by_default(smoke: Space, tmp_path: Path) -> None:
    options = resolve(smoke, data="some/folder")
    assert options.model == "bert-base-uncased"
    assert options.data == str(tmp_path / "some" / "folder")
    assert resolve(smoke, data="some/folder", model="minilm").model == "minilm"
    assert resolve(smoke, data="~/lab").data == str(Path.home().resolve() / "lab")


@pytest.mark.parametrize(("name", "value"), [("embed_precision", "bfloat16"), ("score_every", 3)])
def test_a_setting_of_all_trials_is_recorded(name: str, value: object, smoke: Space) -> None:
    record = options_record(resolve(smoke, **{name: value}))
    resumed = resolve_options({}, {name: value for name, value in record.items() if value is not None}, smoke)
    assert getattr(base_config(resumed), name) == record[name] == value


def test_a_study_older_than_an_option_resumes_with_the_older_setting(smoke: Space) -> None:
    recorded = {name: value for name, value in options_record(resolve(smoke)).items() if value is not None}
    older = {name: value for name, value in recorded.items() if name not in OLDER_SETTINGS}
    assert resolve_options({}, recorded, smoke).embed_precision == "auto"
    options = base_config(resolve_options({}, older, smoke))
    assert {name: getattr(options, name) for name in OLDER_SETTINGS} == {"embed_precision": "float32", "score_every": 1}
    text = replace(smoke, task="classification")
    on_text = resolve_options({}, older | {"confirm": 0}, text)
    check_task(on_text, is_text=True)  # the default must not count as requested
    identity = {"config": asdict(options), "splits": [], "space": {"name": "s", "hash": "h"}, "precision": "float32"}
    identity |= {"data": {"source": "d", "fingerprint": "f"}, "voxels": {"asked": "all", "key": "k"}, "code": "c"}
    identity |= {"model": {"name": "m", "weights": "w"}, "versions": {}}
    before = identity | {"config": {k: v for k, v in asdict(options).items() if k not in OLDER_SETTINGS}}
    assert differences(before, identity) == []
    (one,) = differences(before, identity | {"config": asdict(replace(options, embed_precision="bfloat16"))})
    assert str(one) == "the setting embed_precision changed from float32 to bfloat16"


def test_paths_become_absolute(smoke: Space, tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    options = resolve(smoke, model="checkpoint", out="there", name="n")
    assert options.model == str(tmp_path / "checkpoint")
    assert options.folder == tmp_path / "there" / "n"
    assert resolve(smoke, model="no-such-folder").model == "no-such-folder"


def test_the_space_sets_trials_and_epochs(tmp_path: Path) -> None:
    full = load_space("lora_full")
    assert (resolve(full).trials, resolve(full).epochs) == (40, 3)
    assert (resolve(full, trials=5, epochs=1).trials, resolve(full, trials=5, epochs=1).epochs) == (5, 1)
    (tmp_path / "bare.py").write_text("def space(trial):\n    return {}\n")
    bare = resolve_options({"space": "./bare.py"}, {}, load_space("./bare.py"))
    assert (bare.trials, bare.epochs, bare.space) == (20, 3, str(tmp_path / "bare.py"))
    assert bare.name.startswith("bare-")


SMALL_AND_LARGE = ((2, 0), (64, 0))


@pytest.mark.parametrize(
    ("address", "nodes", "can_add", "requested", "expected"),
    [
        (None, ((1, 0),), (), {}, (1.0, 0.0, 1)),
        (None, ((2, 0),), (), {}, (2.0, 0.0, 1)),
        (None, ((3, 0),), (), {}, (2.0, 0.0, 1)),
        (None, ((64, 0),), (), {}, (2.0, 0.0, 8)),
        (None, ((64, 0),), (), {"cpus_per_trial": 16.0}, (16.0, 0.0, 4)),
        (None, ((64, 0),), (), {"max_concurrent": 20}, (2.0, 0.0, 20)),
        (None, ((16, 1),), (), {}, (8.0, 1.0, 1)),
        (None, ((16, 4),), (), {}, (4.0, 1.0, 4)),
        (None, ((16, 4),), (), {"gpus_per_trial": 2.0}, (4.0, 2.0, 2)),
        (None, ((16, 1),), (), {"gpus_per_trial": 0.25}, (4.0, 0.25, 4)),
        (None, ((16, 1),), (), {"gpus_per_trial": 0.0}, (2.0, 0.0, 8)),
        (None, ((4, 8),), (), {}, (1.0, 1.0, 4)),
        ("h:1", ((8, 1),) * 3, (), {}, (8.0, 1.0, 3)),
        ("h:1", ((8, 1),) * 3, (), {"gpus_per_trial": 0.5}, (4.0, 0.5, 6)),
        ("h:1", ((0, 0),), ((8, 1),) * 4, {"gpus_per_trial": 0.5}, (4.0, 0.5, 8)),
        ("h:1", SMALL_AND_LARGE, (), {}, (2.0, 0.0, 32)),
        ("h:1", SMALL_AND_LARGE, (), {"max_concurrent": 33}, (2.0, 0.0, 33)),
        ("h:1", SMALL_AND_LARGE, (), {"max_concurrent": 99}, (2.0, 0.0, 33)),
        ("h:1", ((0, 0),), None, {}, (1.0, 0.0, 1)),
        ("h:1", ((4, 0),), None, {"max_concurrent": 20}, (2.0, 0.0, 20)),
    ],
)
def test_trials_share_a_machine_or_a_cluster(
    address: str | None, nodes: tuple[tuple[int, int], ...], can_add: tuple[tuple[int, int], ...] | None,
    requested: dict[str, Any], expected: tuple[float, float, int], smoke: Space, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """``can_add`` is what an autoscaler may add; if it is None (unknown), more trials may run than fit now."""
    more = None if can_add is None else tuple(Node(*size) for size in can_add)
    machines = Machines(address, "x", tuple(Node(*size) for size in nodes), more)
    use_machines(monkeypatch, machines)
    options = resolve(smoke, **requested)
    assert (options.cpus_per_trial, options.gpus_per_trial, options.max_concurrent) == expected
    assert options.machines == machines


@pytest.mark.parametrize(
    ("requested", "expected"),
    [
        (None, None),
        (["a"], ["a"]),
        (["a", "b"], ["a", "b"]),
        (["a,b"], ["a", "b"]),
        (["a,b", "c"], ["a", "b", "c"]),
        (["a,", ",b"], ["a", "b"]),
        (["a, b"], ["a", "b"]),
    ],
)
def test_names_are_separated_by_spaces_or_commas(
    requested: list[str] | None, expected: list[str] | None, smoke: Space
) -> None:
    assert resolve(smoke, subjects=requested).subjects == expected
    assert resolve(smoke, test_stories=requested).test_stories == expected


@pytest.mark.parametrize(
    ("requested", "layer"),
    [("last", None), (None, None), ("0", 0), ("12", 12), (5, 5), ("3-3", (3,)), ("4-6", (4, 5, 6)), ("2,0", (2, 0))],
)
def test_layers(requested: str | int | None, layer: int | tuple[int, ...] | None, smoke: Space) -> None:
    assert resolve(smoke, layer=requested).layer == layer


@pytest.mark.parametrize(
    ("requested", "message"),
    [
        ({"trials": -1}, "--trials -1: must be at least 0"),
        ({"epochs": 0}, "--epochs 0: must be at least 1"),
        ({"seed": -1}, "--seed -1: must be at least 0"),
        ({"outer_folds": 0}, "--outer-folds 0: must be at least 1"),
        ({"max_concurrent": 0}, "--max-concurrent 0: must be at least 1"),
        ({"cpus_per_trial": 5.0}, "--cpus-per-trial 5: this machine has 4"),
        ({"gpus_per_trial": 1.0}, "--gpus-per-trial 1: this machine has 0"),
        ({"scheduler": "hyperband"}, "--scheduler hyperband: must be one of none, asha, median"),
        ({"score_every": 0}, "--score-every 0: must be at least 1"),
        ({"score_every": 3, "scheduler": "asha"}, "--score-every 3: --scheduler asha needs the CC of every epoch"),
        ({"confirm": 2, "trials": 0}, "--confirm 2: with --trials 0 nothing is searched"),
        ({"confirm": -1}, "--confirm -1: must be at least 0"),
        ({"confirm_seeds": 0}, "--confirm-seeds 0: must be at least 1"),
        ({"keep_adapters": -1}, "--keep-adapters -1: must be at least 0"),
        ({"embed_precision": "half"}, "--embed-precision half: must be one of auto, float32, bfloat16"),
        *(({"delta": cc}, f"^--delta {cc:g}: must be a CC above 0 and below 1$") for cc in (0.0, -0.1, 1.0, NAN)),
        *(({"trial_timeout": s}, f"--trial-timeout {s:g}: must be a number of seconds") for s in (0.0, -1.0, NAN, INF)),
        *(({"test_stories": names}, "name at least one") for names in ([], [""], [" ,"])),
        *(({"layer": layer}, f"--layer {layer}: give 'last', a number") for layer in ("foo", "", "1.5", "first")),
        ({"name": ""}, "--name '': must be a plain folder name"),
        ({"name": "a/b"}, "--name a/b: must be a plain folder name"),
        ({"name": ".."}, r"--name \.\.: must be a plain folder name"),
        ({"name": ".hidden"}, "must be a plain folder name"),
    ],
)
def test_values_out_of_range_are_refused(requested: dict[str, Any], message: str, smoke: Space) -> None:
    with pytest.raises(InputError, match=message):
        resolve(smoke, **requested)


RECORDED = {
    **{"space": "smoke", "data": "/data/lab", "model": "bert-base-uncased", "layer": 7, "subjects": ["subject2"]},
    **{"train_stories": 20, "test_stories": ["alpha"], "trials": 9, "epochs": 2, "seed": 5, "outer_folds": 3},
    **{"mlm_text": "all"},
}


@pytest.mark.parametrize(
    ("requested", "expected"),
    [
        ({}, {}),
        ({"trials": 30}, {"trials": 30}),
        ({"layer": "last"}, {"layer": None}),
        ({"layer": "0"}, {"layer": 0}),
        ({"subjects": ["subject3"]}, {"subjects": ["subject3"]}),
        ({"seed": 0}, {"seed": 0}),
        ({"data": "demo"}, {"data": "demo", "model": "bert-base-uncased"}),
    ],
)
def test_requested_options_override_recorded_ones(
    requested: dict[str, Any], expected: dict[str, Any], smoke: Space
) -> None:
    options = resolve_options({"space": "smoke", "name": "n"} | requested, RECORDED, smoke)
    assert {name: getattr(options, name) for name in RECORDED} == RECORDED | expected


REQUESTED = {
    "cpus_per_trial": 3.0,
    "gpus_per_trial": 0.25,
    "max_concurrent": 2,
    "trial_timeout": 0.5,
    "tensorboard": True,
}


def of(options: Options, *names: str) -> tuple[Any, ...]:
    return tuple(getattr(options, name) for name in names)


def test_machine_options_are_recorded_and_used_again(smoke: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 16, 1)
    recorded = options_record(resolve(smoke, **REQUESTED))
    resumed = resolve(smoke, recorded)
    assert of(resumed, *REQUESTED) == tuple(REQUESTED.values())
    assert options_record(resumed) == recorded
    assert resumed.machines.notes == ()
    changed = resolve(smoke, recorded, trial_timeout=5.0, gpus_per_trial=1.0)
    assert of(changed, *REQUESTED) == (3.0, 1.0, 1, 5.0, True)
    assert options_record(changed) == recorded | {"trial_timeout": 5.0, "gpus_per_trial": 1.0}


def test_machine_options_without_request_follow_the_machine(smoke: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 64, 4)
    recorded = options_record(resolve(smoke))
    machine(monkeypatch, 4, 0)
    resumed = resolve(smoke, recorded)
    assert of(resumed, "cpus_per_trial", "gpus_per_trial", "max_concurrent") == (2.0, 0.0, 2)
    assert not {"cpus_per_trial", "gpus_per_trial", "max_concurrent", "out"} & set(recorded)


@pytest.mark.parametrize(
    ("n_cpus", "expected", "noted"),
    [
        (4, (3.0, 0.0, 1), ["--gpus-per-trial 0.25"]),
        (2, (2.0, 0.0, 1), ["--cpus-per-trial 3", "--gpus-per-trial 0.25"]),
    ],
)
def test_machine_options_that_do_not_fit_fall_back_to_defaults_with_a_note(
    smoke: Space, n_cpus: int, expected: tuple[float, float, int], noted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, 16, 1)
    recorded = options_record(resolve(smoke, **REQUESTED))
    machine(monkeypatch, n_cpus, 0)
    resumed = resolve(smoke, recorded)
    assert of(resumed, "cpus_per_trial", "gpus_per_trial", "max_concurrent") == expected
    notes = [f"the {one} of the study does not fit here; the default is used instead" for one in noted]
    assert sorted(resumed.machines.notes) == notes
    assert options_record(resumed) == recorded, "they are still recorded for the first machine"
    with pytest.raises(InputError, match=r"--gpus-per-trial 0\.5: this machine has 0"):
        resolve(smoke, recorded, gpus_per_trial=0.5)


def test_a_resumed_study_uses_the_requested_location(smoke: Space) -> None:
    options = resolve_options({"space": "smoke", "name": "n"}, RECORDED | {"out": "/elsewhere"}, smoke)
    assert options.out == str(Path("results").resolve())


@pytest.mark.parametrize("out", ["s3://bucket/prefix", "gs://bucket/prefix"])
def test_tensorboard_needs_a_folder(out: str, smoke: Space) -> None:
    assert not resolve(smoke, out=out).tensorboard
    with pytest.raises(InputError, match=rf"^--tensorboard: .*--out {out}"):
        resolve(smoke, out=out, tensorboard=True)


@pytest.mark.parametrize(
    ("out", "resume", "message"),
    [
        ("s3://bucket/prefix", False, "--take-over: add --resume"),
        ("results", True, "--take-over: not available in a folder"),
        ("results", False, "--take-over: add --resume"),
    ],
)
def test_take_over_without_effect_is_refused(out: str, resume: bool, message: str, smoke: Space) -> None:
    options = resolve(smoke, out=out)
    with pytest.raises(InputError, match=f"^{message}"):
        check_take_over(options, ResumePolicy(resume=resume, take_over=True))
    check_take_over(options, ResumePolicy(resume=resume))
    check_take_over(resolve(smoke, out="s3://bucket/prefix"), ResumePolicy(resume=True, take_over=True))


def test_recorded_options_are_read_back(smoke: Space, tmp_path: Path) -> None:
    options = resolve(smoke, layer="3", subjects=["a,b"], trials=4, out=str(tmp_path), name="study")
    options.folder.mkdir()
    write_json(options.folder / "study.json", {"options": options_record(options)})
    assert read_recorded(str(tmp_path), "study", False) == {}, "without --resume"
    recorded = read_recorded(str(tmp_path), "study", True)
    assert resolve_options({"space": "smoke", "name": "study", "out": str(tmp_path)}, recorded, smoke) == options
    assert set(options_record(options)) == {name for name, option in MEANINGS.items() if option.scope == STUDY} | {
        "deltas_before"
    }


def test_resume_takes_the_latest_study_by_default(tmp_path: Path) -> None:
    for age, name in enumerate(("newest", "middle", "oldest")):
        (tmp_path / "results" / name).mkdir(parents=True)
        file = tmp_path / "results" / name / "study.json"
        write_json(file, {"options": {"space": "smoke", "seed": age, "layer": None}})
        os.utime(file, (1e9 - 100 * age, 1e9 - 100 * age))
    assert read_recorded(None, None, True) == {"space": "smoke", "seed": 0, "name": "newest"}
    assert read_recorded("results", "oldest", True) == {"space": "smoke", "seed": 2, "name": "oldest"}


def test_resume_without_a_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"--resume: no study in {tmp_path / 'results'}; give --out or --name"):
        read_recorded(None, None, True)
    with pytest.raises(InputError, match=f"--resume: no study gone in {tmp_path}; there: none"):
        read_recorded(str(tmp_path), "gone", True)
    (tmp_path / "here").mkdir()
    write_json(tmp_path / "here" / "study.json", {"options": {}})
    with pytest.raises(InputError, match=f"--resume: no study gone in {tmp_path}; there: here"):
        read_recorded(str(tmp_path), "gone", True)


@pytest.mark.parametrize("content", ["", '{"options": {"spa', "{}", "[]"])
def test_a_damaged_study_file_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "study.json").write_text(content)
    with pytest.raises(InputError, match=r"study/study\.json: damaged"):
        read_recorded(str(tmp_path), "study", True)


@pytest.mark.parametrize(
    ("requested", "is_text", "named"),
    [
        ({"outer_folds": 3}, True, "--outer-folds"),
        ({"layer": "2"}, True, "--layer"),
        ({"baselines": ["random"]}, True, "--baselines"),
        ({"trust_alignment": True}, True, "--trust-alignment"),
        ({"delta": 0.01}, True, "--delta"),
        ({"clean": True}, False, "--clean"),
        ({"max_length": 64}, False, "--max-length"),
    ],
)
def test_options_of_the_other_kind_of_study_are_refused(
    smoke: Space, requested: dict[str, Any], is_text: bool, named: str
) -> None:
    options = resolve(smoke, **requested)
    with pytest.raises(InputError, match=f"{named}: not available for"):
        check_task(options, is_text)
    check_task(options, not is_text)
    check_task(resolve(smoke), is_text)


def test_the_probe_may_not_be_the_text_to_learn(smoke: Space, tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("the same words\n")
    with pytest.raises(InputError, match="text to train on cannot be the probe"):
        resolve(smoke, probe="a.txt", control_text="b.txt")
    with pytest.raises(InputError, match=r"--probe .*a\.txt: is the text to train on"):
        resolve(smoke, probe="a.txt", data="a.txt")


def test_the_space_chooses_sampler_and_scheduler_by_default(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("SAMPLER, SCHEDULER = 'qmc', 'asha'\ndef space(trial):\n    return {}\n")
    own = load_space("./own.py")
    assert (resolve(own).sampler, resolve(own).scheduler) == ("qmc", "asha")
    assert resolve(own, scheduler="none").scheduler == "none"
    assert resolve(load_space("./own.py", None, "random")).sampler == "random"
    recorded = options_record(resolve(own, scheduler="median"))
    resumed = resolve_options({"space": "./own.py"}, recorded, load_space("./own.py", None, recorded["sampler"]))
    assert (resumed.sampler, resumed.scheduler) == ("qmc", "median")


def test_a_grid_has_no_more_trials_than_points_times_seeds(tmp_path: Path) -> None:
    source = (
        "SAMPLER, SEEDS = 'grid', (3, 4)\ndef space(trial):\n    return {'rank': trial.suggest_int('rank', 1, 5)}\n"
    )
    (tmp_path / "grid.py").write_text(source)
    grid = load_space("./grid.py")
    assert [resolve(grid, trials=n).trials for n in (0, 3, 10, 11, 500)] == [0, 3, 10, 10, 10]
    assert resolve(grid).trials == 10
    assert resolve(load_space("./grid.py", None, "tpe"), trials=500).trials == 500


def test_the_address_reaches_the_search_for_machines(smoke: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def find(address: str | None) -> Machines:
        asked.append(address)
        return Machines(None, "x", (Node(4, 0),))

    monkeypatch.setattr(machine_share, "find_machines", find)
    resolve(smoke)
    resolve(smoke, address="10.0.0.5:6379")
    resolve(smoke, recorded=options_record(resolve(smoke, address="h:1")))
    assert asked == [None, "10.0.0.5:6379", "h:1", None], "a study that is resumed elsewhere is not sent back"


def test_delta_and_earlier_deltas_are_recorded(smoke: Space) -> None:
    begun = options_record(resolve(smoke))
    assert (begun["delta"], begun["deltas_before"]) == (0.002, [])
    assert delta_note(begun, 0.002) is None
    kept = resolve(smoke, begun)
    assert (kept.delta, kept.deltas_before) == (0.002, [])
    changed = options_record(resolve(smoke, begun, delta=0.01))
    assert (changed["delta"], changed["deltas_before"]) == (0.01, [0.002])
    assert delta_note(changed, 0.01) == "delta 0.01 was chosen after the study (0.002 was set)"
    again = options_record(resolve(smoke, changed, delta=0.003))
    assert (again["delta"], again["deltas_before"]) == (0.003, [0.002, 0.01])
    assert delta_note(again, 0.003) == "delta 0.003 was chosen after the study (0.002 was set)"
    assert delta_note(again, 0.002) is None, "the first one"
    old = resolve(smoke, {"space": "smoke", "seed": 1}, delta=0.01)
    assert old.deltas_before == [0.002], "a study without a record of delta began with the default"
    assert resolve(smoke, delta=0.01).deltas_before == [], "a new study may choose"


def test_every_option_has_help_in_a_group() -> None:
    arguments = app.assemble_argument_collection(parse_docstring=True)
    leaves = [argument for argument in arguments if not argument.children and argument.parameter.parse is not False]
    assert {argument.names[0] for argument in leaves} >= {"--space", "--keep-adapters", "--resume", "--dry-run"}
    for argument in leaves:
        assert argument.parameter.help, argument.names
        assert argument.parameter.group[0].name != "Parameters", argument.names


@pytest.mark.parametrize("arguments", [[], ["--baselines", "random", "--clean"], ["--trials", "3", "--layer", "4-6"]])
def test_options_are_parsed_where_pydantic_is_imported_too(arguments: list[str]) -> None:
    """The command line validates values, also of absent options, with pydantic if it was imported."""
    pytest.importorskip("pydantic")
    bound = app.parse_args(arguments, exit_on_error=False, print_error=False)[1]
    values = bound.arguments["options"].set_values() if arguments else {}
    expected = [{}, {"baselines": ["random"], "clean": True}, {"trials": 3, "layer": "4-6"}]
    assert values in expected and bool(values) == bool(arguments)


def test_gpus_per_trial_above_1_must_be_a_whole_number(smoke: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 16, 4)
    for requested, message in ((1.5, "above 1 it must be a whole number"), (NAN, "this machine has 4$")):
        with pytest.raises(InputError, match=f"^--gpus-per-trial {requested}: {message}"):
            resolve(smoke, gpus_per_trial=requested)
