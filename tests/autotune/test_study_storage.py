"""Studies in storages that users name, shared by workers, some of which are killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest

from nanoflow_tune.autotune import study_storage
from nanoflow_tune.autotune.baselines import equal_split_choice
from nanoflow_tune.autotune.cost_model import CostModel
from nanoflow_tune.autotune.refine import Family, refine, study_name
from nanoflow_tune.autotune.study_storage import open_storage, without_password

from .fakes import MIX, graph_of, h200, linear_profile, quick_space

GRAPH = graph_of("llama3-8b")
FAMILY = Family(
    graph=GRAPH,
    cost_model=CostModel(linear_profile(GRAPH), h200()),
    space=quick_space(),
    mix=MIX,
)
FIRST = FAMILY.parameters(equal_split_choice(GRAPH, MIX, h200(), quick_space()))
STATES = optuna.trial.TrialState


def loaded(url: str) -> optuna.Study:
    name = study_name(FAMILY, 0, "simulator")
    return optuna.load_study(study_name=name, storage=open_storage(url))


def work(url: str, trials: int, best: Any) -> None:
    found = refine(FAMILY, trials=trials, seed=0, storage=url, enqueue=[FIRST])
    best.put(min(candidate.predicted.period_us for candidate in found))


@pytest.mark.parametrize("kind", ["sqlite:///", "journal:"])
def test_two_workers_share_a_study_and_each_knows_what_the_other_found(kind: str, tmp_path: Path):
    url, trials = f"{kind}{tmp_path}/shared", 40
    context = multiprocessing.get_context("spawn")
    best = context.Queue()
    workers = [context.Process(target=work, args=(url, trials, best)) for _ in range(2)]
    for worker in workers:
        worker.start()
    results = [best.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
    done = [trial for trial in loaded(url).trials if trial.state.is_finished()]
    # The one that ends last knows all; no trial is lost, and at most one too many is made.
    assert trials <= len(done) <= trials + 1
    values = [trial.value for trial in done if trial.state == STATES.COMPLETE]
    assert min(results) == pytest.approx(min(v for v in values if v is not None))
    assert {trial.user_attrs["worker"].split(":")[0] for trial in done} == {socket.gethostname()}


def open_together(url: str, gate: Any, said: Any) -> None:
    gate.wait()
    try:
        open_storage(url)
    except ValueError as err:
        said.put(str(err))
    else:
        said.put("opened")


def test_workers_that_start_at_once_make_the_tables_once(tmp_path: Path):
    context = multiprocessing.get_context("spawn")
    gate, said = context.Barrier(4), context.Queue()
    arguments = f"sqlite:///{tmp_path}/new.db", gate, said
    workers = [context.Process(target=open_together, args=arguments) for _ in range(4)]
    for worker in workers:
        worker.start()
    assert [said.get(timeout=120) for _ in workers] == ["opened"] * 4
    for worker in workers:
        worker.join()


def test_a_trial_whose_worker_was_killed_is_tried_again(tmp_path: Path):
    url = f"sqlite:///{tmp_path}/search.db"
    refine(FAMILY, trials=1, seed=0, storage=url)
    study = loaded(url)
    ended = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    ended.send_signal(signal.SIGKILL)
    ended.wait()
    study.enqueue_trial(FIRST)
    study.ask().set_user_attr("worker", f"{socket.gethostname()}:{ended.pid}")
    alive = study.ask()
    alive.set_user_attr("worker", f"{socket.gethostname()}:{os.getpid()}")
    other = study.ask()
    other.set_user_attr("worker", "elsewhere:1")
    refine(FAMILY, trials=4, seed=0, storage=url, enqueue=[FIRST])
    trials = loaded(url).trials
    assert trials[1].state == STATES.FAIL
    assert trials[alive.number].state == trials[other.number].state == STATES.RUNNING
    again = next(trial for trial in trials if trial.user_attrs.get("retries") == 1)
    assert again.state == STATES.COMPLETE
    assert again.params.items() <= FIRST.items()


def test_a_trial_of_another_host_is_lost_after_an_hour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    study = optuna.create_study(storage=f"sqlite:///{tmp_path}/search.db")
    study.ask().set_user_attr("worker", "elsewhere:1")
    study_storage.retry_lost(study)
    assert study.trials[0].state == STATES.RUNNING
    monkeypatch.setattr(study_storage, "LOST_AFTER", -study_storage.LOST_AFTER)
    study_storage.retry_lost(study)
    assert study.trials[0].state == STATES.FAIL


@pytest.mark.parametrize(
    "url", ["search.db", "sqlite:////nowhere/at/all.db", "journal:/nowhere/x", "what://a:b@c/d"]
)
def test_a_storage_that_cannot_be_opened_is_refused_without_its_password(url: str):
    with pytest.raises(ValueError, match="--storage must be") as refused:
        open_storage(url)
    assert "a:b" not in str(refused.value)


def test_passwords_are_hidden():
    assert without_password("x --storage postgresql://me:secret@db/n y") == (
        "x --storage postgresql://***@db/n y"
    )
