"""A run's folder: what a launch takes, refuses and moves aside; its lock; what a resumed run may change."""

import itertools
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from megatron_ext.settings import FREE, KEPT, ON_RESUME, RAISED, on_resume, setting
from recipes.config import Config, parse
from recipes.config.resume import check_resume, differences
from recipes.errors import ConfigError
from recipes.launch import claim
from recipes.run import folder as run_folder
from recipes.run import lock, records

ROOT = Path(__file__).resolve().parents[2]
CONF = str(ROOT / "conf")
OURS = lock.this_process()


@cache
def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(CONF, version_base="1.3"):
        return compose("config", overrides=list(overrides))


def configured(folder: Path, *overrides: str) -> Config:
    return parse(composed("recipe=demo", f"run_dir={folder}", *overrides))


def tree(folder: Path) -> dict[str, bytes | None]:
    """All that is in a folder: relative path → content, None for a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def take(folder: Path, *overrides: str) -> None:
    """What a launch does to the folder that claims it and ends."""
    with claim.claimed(configured(folder, *overrides)):
        pass


def make_run(folder: Path, *overrides: str) -> None:
    """A run with a checkpoint, a model and settings."""
    config = configured(folder, *overrides)
    with claim.claimed(config):
        run_folder.write_settings(folder, config)
        for name in ("checkpoints/step_000001/complete.json", "hf/config.json", "metrics.jsonl"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text('{"step": 1}\n')


# The folder


def test_a_folder_and_its_parents_are_made_and_marked_and_the_lock_goes_with_the_launch(tmp_path: Path) -> None:
    folder = tmp_path / "some runs" / "the first (1)"
    with claim.claimed(configured(folder.parent / "x", f"run_dir='{folder}'")):
        assert run_folder.is_run(folder) and (folder / "logs").is_dir()
        assert len(list(folder.glob("lock.*"))) == 1
    assert sorted(path.name for path in folder.iterdir()) == ["logs", run_folder.MARK]
    with pytest.raises(ZeroDivisionError), claim.claimed(configured(folder.parent / "x", f"run_dir='{folder}'")):
        raise ZeroDivisionError
    assert not list(folder.glob("lock.*"))


@pytest.mark.parametrize("options", [[], ["overwrite=true"], ["resume=true"]], ids=["plain", "overwrite", "resume"])
def test_a_folder_of_something_else_is_left_as_it_is(options: list[str], tmp_path: Path) -> None:
    """Names of a run's own files do not make it a run's."""
    for name in ("hf/weights.bin", "checkpoints/mine", "logs/notes", "config.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("precious")
    before = tree(tmp_path)
    with pytest.raises(
        ConfigError, match=r"holds checkpoints, config.yaml, hf, logs, but no run\.json, .* empty folder"
    ):
        take(tmp_path, *options)
    assert tree(tmp_path) == before


def test_a_run_with_results_is_refused_with_the_ways_on(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    before = tree(tmp_path)
    with pytest.raises(ConfigError, match=r"holds a run with results \(checkpoints, hf, metrics.jsonl\)\.") as refused:
        take(tmp_path / "run")
    assert all(way in str(refused.value) for way in ("resume=true", "run_dir=OTHER", "overwrite=true", "run.1"))
    assert tree(tmp_path) == before


def test_overwrite_moves_the_whole_run_aside_and_deletes_nothing(tmp_path: Path) -> None:
    """Also behind a link to another disk; an empty folder of the next name is somebody's too."""
    disk, link = tmp_path / "disk" / "run", tmp_path / "run"
    disk.mkdir(parents=True)
    link.symlink_to(disk)
    make_run(link)
    first = tree(disk)
    disk.with_name("run.1").mkdir()
    take(link, "overwrite=true")
    assert tree(disk.with_name("run.2")) == first
    assert tree(disk).keys() == {"logs", run_folder.MARK} and link.is_symlink()
    assert run_folder.run_id(disk) != json.loads(first[run_folder.MARK] or b"")["id"]
    make_run(link)
    take(link, "overwrite=true")
    assert sorted(path.name for path in disk.parent.iterdir()) == ["run", "run.1", "run.2", "run.3"]
    assert list(disk.with_name("run.1").iterdir()) == []


def test_a_launch_that_made_no_result_is_repeated_in_its_folder(tmp_path: Path) -> None:
    """Its logs and events stay, and its settings under another name."""
    config = configured(tmp_path)
    with claim.claimed(config):
        run_folder.write_settings(tmp_path, config)
        records.event(tmp_path, "start")
        (tmp_path / "logs" / "rank_0.log").write_text("out of memory\n")
        (tmp_path / "checkpoints").mkdir()  # made before the first is written
    again = configured(tmp_path, "seed=2")
    with claim.claimed(again):
        run_folder.write_settings(tmp_path, again)
    assert (tmp_path / "logs" / "rank_0.log").read_text() == "out of memory\n"
    assert [event["kind"] for event in records.read_events(tmp_path / "events.jsonl")] == ["start"]
    assert [yaml.safe_load((tmp_path / f).read_text())["seed"] for f in ("config.1.yaml", "config.yaml")] == [1, 2]
    (tmp_path / "answers.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"with results \(answers\.json\)"):
        take(tmp_path)


def test_what_reward_servers_wrote_before_the_launch_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "servers").mkdir()
    (tmp_path / "servers" / "judge_0.log").touch()
    (tmp_path / "events.jsonl").touch()
    take(tmp_path)
    assert run_folder.is_run(tmp_path)


@pytest.mark.parametrize(
    ("below", "message"),
    [
        ("file", "is a file; give a folder"),
        ("file/run", "can't be used: .*file.*: Not a directory; give a folder"),
        ("sealed/run", r"can't be used: .*sealed/run: Read-only file system"),
    ],
)
def test_a_folder_that_can_t_be_used_is_told(
    below: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    mkdir = Path.mkdir

    def refuse(path: Path, *arguments: Any, **options: Any) -> None:  # root may write anywhere
        if "sealed" in path.parts:
            raise OSError(30, "Read-only file system", str(path))
        mkdir(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ConfigError, match=message):
        take(tmp_path / below)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["run_dir="], "run_dir='': give the run's folder"),
        (["run_dir=' '"], "run_dir=' ': give the run's folder"),
        (["run_dir='~/runs'"], "run_dir='~/runs': nothing puts your home in place of ~ here; write $HOME"),
        (["resume=2"], "resume=2: use true or false"),
        (["overwrite=yes"], "overwrite='yes': use true or false"),
        (["rollout.sleep=1"], "rollout.sleep=1: use true or false"),
        (["resume=true", "overwrite=true"], "resume=true, overwrite=true: "),
    ],
)
def test_settings_of_the_folder_that_can_t_work(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(composed("recipe=demo", *overrides))
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize("name", ["my runs (1)", "a=b"])
def test_the_command_line_says_how_to_quote_a_path_and_that_works(name: str, tmp_path: Path) -> None:
    def claimed(argument: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "recipes.launch.claim", "recipe=demo", argument]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    refused = claimed(f"run_dir={tmp_path / name}")
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    quoted = f"run_dir='{tmp_path / name}'"
    assert f'quote the value, for the shell too: "{quoted}"' in refused.stdout
    done = claimed(quoted)
    assert done.returncode == 0, done.stdout + done.stderr
    assert run_folder.is_run(tmp_path / name)


# A rank that no launcher started


def hold(folder: Path, *overrides: str) -> None:
    with claim.held_by_rank(configured(folder, *overrides)):
        pass


def test_ranks_of_srun_want_a_folder_that_is_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    with pytest.raises(ConfigError, match="is not prepared for this launch; before srun or torchrun call once"):
        hold(folder)
    monkeypatch.setattr(claim, "MARK_SECONDS", 0.0)
    with pytest.raises(ConfigError, match="sees no run there"):
        claim.wait_for_mark(configured(folder))
    assert not folder.exists()
    make_run(folder)
    before = tree(tmp_path)
    with pytest.raises(ConfigError, match="is not prepared for this launch"):  # whose results nobody moved aside
        hold(folder, "overwrite=true")
    with pytest.raises(SystemExit):
        claim.wait_for_mark(configured(folder))
    assert tree(tmp_path) == before
    take(folder, "overwrite=true")
    with claim.held_by_rank(configured(folder, "overwrite=true")):
        claim.wait_for_mark(configured(folder))
        assert len(list(folder.glob("lock.*"))) == 1
        assert not (tmp_path / "run.2").exists(), "it is moved aside once"
    assert not list(folder.glob("lock.*"))


# The lock

HOLD = """
import sys, time
from pathlib import Path
from recipes.errors import ConfigError
from recipes.run import lock
folder, seconds = Path(sys.argv[1]), float(sys.argv[2])
try:
    own = lock.take(folder)
except ConfigError:
    sys.exit(3)
began = time.monotonic()
print("taken", flush=True)
time.sleep(seconds)
print(began, time.monotonic(), flush=True)
lock.release(own)
"""


def holder(folder: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLD, str(folder), str(seconds)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_a_second_launch_is_kept_out_until_the_first_is_gone_also_by_kill_9(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    first = holder(tmp_path / "run", 600)
    try:
        assert first.stdout is not None and first.stdout.readline() == "taken\n"
        before = tree(tmp_path)
        for options in ([], ["resume=true"], ["overwrite=true"]):
            with pytest.raises(ConfigError, match=f"another launch uses it: process {first.pid} on ") as refused:
                take(tmp_path / "run", *options)
            assert f"`ps -p {first.pid}`" in str(refused.value) and "remove " in str(refused.value)
        assert tree(tmp_path) == before
    finally:
        first.send_signal(signal.SIGKILL)
    while lock.start_of(first.pid) is not None:  # it may be a zombie for ever: nobody has waited for it
        time.sleep(0.01)
    take(tmp_path / "run", "resume=true")
    assert not list((tmp_path / "run").glob("*lock.*"))
    first.wait()


def test_of_many_launches_at_once_no_two_hold_the_folder_together(tmp_path: Path) -> None:
    """A dead one's lock lies there, which all of them find."""
    dead = replace(OURS, started=OURS.started + 1)
    (tmp_path / "lock.0000000000000000").write_text(json.dumps(vars(dead)))
    launches = [holder(tmp_path, 0.2) for _ in range(6)]
    printed = [launch.communicate(timeout=600)[0].splitlines() for launch in launches]
    assert {launch.returncode for launch in launches} <= {0, 3}
    held = sorted(tuple(map(float, lines[1].split())) for lines in printed if lines)
    assert held
    assert all(first[1] <= second[0] for first, second in itertools.pairwise(held))
    assert list(tmp_path.iterdir()) == []


ELSEWHERE = replace(OURS, host="far", boot="other", namespace=lock.HOST_NAMESPACE)
HERE = replace(OURS, namespace=lock.HOST_NAMESPACE, boot="this")


@pytest.mark.parametrize(
    ("holder", "observer", "dead"),
    [
        (OURS, OURS, False),
        (replace(OURS, started=OURS.started - 1), OURS, True),  # the number was given to another process
        (replace(OURS, pid=2**22 + 1), OURS, True),
        (ELSEWHERE, HERE, False),
        (replace(HERE, boot="before"), HERE, True),  # this host was started again
        (replace(HERE, boot="before", namespace="pid:[7]"), HERE, False),  # a container of the same name
        (replace(ELSEWHERE, job="c/7"), replace(HERE, job="c/7", restart=1), True),  # requeued
        (replace(ELSEWHERE, job="c/7"), replace(HERE, job="c/7"), False),  # another step of the same job
        (replace(OURS, job="c/7"), replace(OURS, job="c/7", restart=1), False),  # it is seen to live
    ],
)
def test_who_is_known_to_be_dead(holder: lock.Holder, observer: lock.Holder, dead: bool) -> None:
    assert lock.is_dead(holder, observer) is dead


@pytest.mark.parametrize(
    ("squeue", "cluster", "dead"),
    [
        ("exit 0", "c", True),
        ("echo RUNNING", "c", False),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", "c", True),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", "c", False),
        ("exit 0", "d", False),  # another cluster's Slurm knows nothing of it
        (None, "c", False),
    ],
)
def test_slurm_is_asked_for_the_holder_s_job(
    squeue: str | None, cluster: str, dead: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if squeue is not None:
        (tmp_path / "squeue").write_text(f'#!/bin/sh\n[ "$3" = --jobs=7 ] || exit 9\n{squeue}\n')
        (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin" if squeue else str(tmp_path))
    monkeypatch.setenv("SLURM_CLUSTER_NAME", cluster)
    assert lock.is_dead(replace(ELSEWHERE, job="c/7"), HERE) is dead


def test_a_launch_on_another_host_is_named_with_what_to_do(tmp_path: Path) -> None:
    take(tmp_path)
    for job, tell in ((None, "`ps -p 4711` on far lists nothing, or that host is gone"), ("c/7", "`squeue --jobs=7`")):
        far = replace(ELSEWHERE, pid=4711, since="2026-01-02 03:04:05+00:00", job=job)
        (tmp_path / "lock.f").write_text(json.dumps(vars(far)))
        with pytest.raises(ConfigError, match=r"process 4711 on far.*, since 2026-01-02 03:04:05") as refused:
            take(tmp_path)
        assert tell in str(refused.value) and f"remove {tmp_path / 'lock.f'}" in str(refused.value)
    (tmp_path / "lock.f").write_text("")
    with pytest.raises(ConfigError, match="is no lock of a run"):
        take(tmp_path)


# The settings of a resumed run


def stored(folder: Path, *overrides: str) -> dict[str, Any]:
    run_folder.write_settings(folder, configured(folder, *overrides))
    return yaml.safe_load((folder / "config.yaml").read_text())


BF16 = "precision=bf16"  # in the place of what this machine's processor has


@pytest.mark.parametrize(
    "override",
    [
        "seed=2",
        "model.path=other",
        "data.prompts=recipes/data/demo/sft.jsonl",
        "data.mix.benign=1",
        "algorithm=rloo",
        "algorithm.prompts_per_step=16",
        "algorithm.steps=3",
        "algorithm.clip_low=0.1",
        "optimizer.weight_decay=0.1",
        "precision.name=fp32",
        "rollout.temperature=0.5",
        "++rewards.mix.safety.safety=0.25",
        "stage.sft.learning_rate=1e-3",
    ],
)
def test_another_experiment_is_refused_with_both_values_and_accepted_by_its_name(override: str, tmp_path: Path) -> None:
    before = stored(tmp_path, BF16)
    with pytest.raises(ConfigError, match="would become another experiment") as refused:
        check_resume(before, configured(tmp_path, BF16, override))
    refusals = [each for each in differences(before, configured(tmp_path, BF16, override)) if not each.allowed]
    assert refusals
    for each in refusals:
        was, shall_be = json.dumps(each.stored, ensure_ascii=False), json.dumps(each.given, ensure_ascii=False)
        assert f"{each.field}: {was} → {shall_be}" in str(refused.value)
    names = ",".join(each.field for each in refusals)
    assert f"resume_accept=[{names}]" in str(refused.value)
    check_resume(before, configured(tmp_path, BF16, override, f"resume_accept=[{names}]"))
    group = {each.field.partition(".")[0] for each in refusals}
    check_resume(before, configured(tmp_path, BF16, override, f"resume_accept=[{','.join(group)}]"))
    with pytest.raises(ConfigError, match="would become another experiment"):
        check_resume(before, configured(tmp_path, BF16, override, "resume_accept=[critic]"))


@pytest.mark.parametrize(
    ("overrides", "fields"),
    [
        ([], []),
        (["resume=true"], []),
        (["logger=tensorboard"], ["logger.tensorboard"]),
        (["algorithm.steps=99"], ["algorithm.steps"]),
        (["cluster.ranks=4", "parallel.pipeline=2"], ["cluster.ranks", "parallel.pipeline"]),
        (["rollout.kv_cache_gib=3", "checkpoint.keep=9"], ["checkpoint.keep", "rollout.kv_cache_gib"]),
        (["rewards.client.timeout=7"], ["rewards.client.timeout"]),
    ],
)
def test_what_leaves_the_experiment_as_it_is_may_change(
    overrides: list[str], fields: list[str], tmp_path: Path
) -> None:
    changed = check_resume(stored(tmp_path), configured(tmp_path, *overrides))
    assert sorted(each.field for each in changed) == fields


def test_a_judge_may_move_but_not_become_another(tmp_path: Path) -> None:
    judge = "+rewards.servers.judge={model: a, endpoints: ['http://node1:8000']}"
    before = stored(tmp_path, judge)
    moved = judge.replace("node1", "node2")
    assert [each.allowed for each in check_resume(before, configured(tmp_path, moved))] == [True]
    with pytest.raises(ConfigError, match=r'rewards\.servers\.judge\.model: "a" → "b"'):
        check_resume(before, configured(tmp_path, moved.replace("model: a", "model: b")))


def test_a_setting_that_one_version_does_not_know_has_to_be_accepted(tmp_path: Path) -> None:
    before = stored(tmp_path)
    del before["algorithm"]["clip_high"]
    before["algorithm"]["temper"] = 3
    with pytest.raises(ConfigError, match="would become another experiment") as refused:
        check_resume(before, configured(tmp_path))
    assert "algorithm.clip_high: absent → 0." in str(refused.value)
    assert "algorithm.temper: 3 → absent" in str(refused.value)


def test_a_name_that_no_setting_has_is_not_accepted(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"algoritm\.steps: no such field; did you mean algorithm\.steps\?"):
        check_resume({}, configured(tmp_path, "resume_accept=[algoritm.steps]"))


def test_a_new_setting_belongs_to_the_experiment_unless_it_says_otherwise() -> None:
    from dataclasses import dataclass

    @dataclass
    class Group:
        silent: int = setting("a")
        more: int = setting("b", on_resume=RAISED)

    @dataclass
    class Schema:
        kept: Group = setting("c")
        free: Group = setting("d", on_resume=FREE)
        alone: int = setting("e")

    Schema.__annotations__.update(kept=Group, free=Group)
    assert on_resume(Schema) == {
        "kept": KEPT,
        "kept.silent": KEPT,
        "kept.more": RAISED,
        "free": FREE,
        "free.silent": FREE,
        "free.more": RAISED,
        "alone": KEPT,
    }
    assert set(on_resume(Config).values()) == set(ON_RESUME)


def test_resuming_wants_a_run(tmp_path: Path) -> None:
    for folder in (tmp_path / "never", tmp_path):
        with pytest.raises(ConfigError, match=r"resume=true: run_dir='.*' holds no run; start it without resume=true"):
            take(folder, "resume=true")
    assert list(tmp_path.iterdir()) == []


def test_a_refused_resume_changes_nothing_and_an_accepted_one_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "run")
    before = tree(tmp_path)
    with pytest.raises(ConfigError, match="seed: 1 → 2"):
        take(tmp_path / "run", "resume=true", "seed=2")
    assert tree(tmp_path) == before
    take(tmp_path / "run", "resume=true", "seed=2", "resume_accept=[seed]", "logger=tensorboard")
    assert capsys.readouterr().out.splitlines() == ["resume: logger.tensorboard: false → true", "resume: seed: 1 → 2"]
