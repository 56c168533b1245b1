"""Signals in training: workers outlive them, and the run saves a checkpoint wherever it gets one."""

import contextlib
import gc
import itertools
import multiprocessing
import os
import signal

import pytest
import torch
from signals import HANGUP
from tiny_training import EVERY_STEP, tiny_trainer
from transformers import TrainerCallback, TrainerState

from binaryvit_hf.data.workers import STOPPING_SIGNALS, describe_dead_worker
from binaryvit_hf.training.callbacks.progress import NamedProgress
from binaryvit_hf.training.checkpoints import last_whole_checkpoint
from binaryvit_hf.training.process_errors import show_error


HANGING_WORKER = """
import time

from torch.utils.data import DataLoader

from binaryvit_hf.data.workers import shield_workers


class Hanging:
    def __len__(self):
        return 9

    def __getitem__(self, index):
        time.sleep(1000 * index)
        return index


batches = iter(shield_workers(DataLoader(Hanging(), num_workers=1)))
print(next(batches))
"""


class At(TrainerCallback):
    """Calls `act` at an event after `step` steps, or more."""

    def __init__(self, event: str, act, step: int = 2):
        setattr(self, event, lambda args, state, control, **kwargs: act() if state.global_step >= step else None)


class Losses(TrainerCallback):
    """Replaces the losses of evaluations, by the step."""

    def __init__(self, losses: dict[int, float]):
        self.losses = losses

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_loss"] = self.losses[state.global_step]


def once(act):
    """`act`, which is called the first time only."""
    calls = itertools.count()
    return lambda: act() if next(calls) == 0 else None


def signal_workers(*numbers: int) -> int:
    """Send signals to all workers; returns how many workers there are."""
    workers = multiprocessing.active_children()
    for worker in workers:
        for number in numbers:
            os.kill(worker.pid, number)
    return len(workers)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def trainer(tmp_path):
    created = []

    def create(**arguments):
        defaults = {"max_steps": 4, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}
        trainer = tiny_trainer(tmp_path, **(defaults | arguments))
        trainer.remove_callback(NamedProgress)
        created.append(trainer)
        return trainer

    yield create
    for trainer in created:  # persistent workers end with their loaders
        trainer.accelerator.free_memory()
        vars(trainer).pop("_eval_dataloaders", None)
    created.clear()
    gc.collect()


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("event", ["on_step_begin", "on_prediction_step"])
def test_workers_outlive_signals_to_all_processes(trainer, event, persistent):
    run = trainer(**EVERY_STEP, dataloader_num_workers=1, dataloader_persistent_workers=persistent)
    workers = []
    run.add_callback(At(event, lambda: workers.append(signal_workers(*STOPPING_SIGNALS))))
    run.train()
    assert run.state.global_step == 4
    assert workers[0] >= 1


def test_workers_of_a_batch_norm_reestimation_outlive_signals_to_all_processes(trainer, monkeypatch):
    run = trainer(dataloader_num_workers=1, batch_norm_reestimation_batches=6)
    forward, workers = run.model.forward, []

    def forward_and_signal(**inputs):
        if not torch.is_grad_enabled():
            workers.append(signal_workers(*STOPPING_SIGNALS))
        return forward(**inputs)

    monkeypatch.setattr(run.model, "forward", forward_and_signal)
    run.apply_final_step()
    assert len(workers) == 6
    assert workers[0] >= 1


@pytest.mark.parametrize("name", ["SIGTERM", HANGUP])
def test_a_signal_to_all_processes_saves_a_checkpoint(trainer, tmp_path, name):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    run = trainer(dataloader_num_workers=1)

    def signal_all():
        assert signal_workers(number)
        os.kill(os.getpid(), number)

    run.add_callback(At("on_step_begin", signal_all))
    run.train()
    assert run.termination.terminated == number
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-3"
    assert signal.getsignal(number) == before


def test_an_evaluation_is_left_for_a_checkpoint(trainer, tmp_path):
    run = trainer(**EVERY_STEP, batch_norm_reestimation_batches=2)
    weights = {}

    def keep_weights_and_terminate():
        terminate()
        weights.update({name: tensor.clone() for name, tensor in run.model.state_dict().items()})

    run.add_callback(At("on_prediction_step", keep_weights_and_terminate))
    run.train()
    assert run.termination.terminated == signal.SIGTERM
    assert [entry["step"] for entry in run.state.log_history if "eval_loss" in entry] == [1]
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert any(not tensor.equal(weights[name]) for name, tensor in run.model.state_dict().items())  # the latest ones
    resumed = trainer(**EVERY_STEP, batch_norm_reestimation_batches=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 4
    assert evaluated_steps(resumed) == [1, 2, 3, 4]


def evaluated_steps(run) -> list[int]:
    return [entry["step"] for entry in run.state.log_history if "eval_loss" in entry]


@pytest.mark.parametrize("event, step", [("on_step_begin", 1), ("on_prediction_step", 2)])
@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_a_resumed_run_makes_the_evaluation_that_a_signal_kept_it_from(trainer, event, step, strategy, tmp_path):
    # After each evaluation the rate changes. Eight images are two steps of an epoch.
    schedule = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0, "threshold": 1.0}}
    counts = {"max_steps": -1, "num_train_epochs": 3, "per_device_train_batch_size": 4}
    arguments = EVERY_STEP | {"save_strategy": strategy, "eval_strategy": strategy} | schedule | counts
    whole = trainer(**arguments)
    whole.train()
    assert whole.optimizer.param_groups[0]["lr"] < whole.args.learning_rate
    cut = trainer(**arguments)
    cut.add_callback(At(event, once(terminate), step))
    cut.train()
    assert cut.state.global_step == 2  # the end of an epoch
    assert 2 not in evaluated_steps(cut)
    resumed = trainer(**arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert evaluated_steps(resumed) == evaluated_steps(whole)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    "counts", [{"num_train_epochs": 1, "max_steps": -1, "eval_strategy": "epoch"}, {"eval_steps": 3}], ids=str
)
def test_a_run_that_resumes_after_its_last_step_makes_its_last_evaluation(trainer, counts, tmp_path):
    arguments = EVERY_STEP | {"per_device_train_batch_size": 2} | counts  # an epoch has four steps
    run = trainer(**arguments)
    run.add_callback(At("on_step_begin", once(terminate), step=3))
    run.train()
    assert 4 not in evaluated_steps(run)
    resumed = trainer(**arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert evaluated_steps(resumed)[-1] == 4
    assert resumed.state.global_step == 4


def test_evaluations_of_several_datasets_are_not_made_again(trainer, tmp_path):
    run = trainer(**EVERY_STEP)
    run.eval_dataset = {"a": run.eval_dataset, "b": run.eval_dataset}
    run.train()
    resumed = trainer(**EVERY_STEP)
    resumed.eval_dataset = run.eval_dataset
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    steps = [entry["step"] for entry in resumed.state.log_history if "eval_a_loss" in entry]
    assert steps == [1, 2, 3, 4]


def test_the_best_model_may_be_of_the_evaluation_that_a_signal_kept_a_run_from(trainer, tmp_path):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "save_total_limit": 1}
    losses = Losses({1: 3.0, 2: 1.0, 3: 2.0, 4: 2.0})
    run = trainer(**EVERY_STEP, **best)
    run.add_callback(losses)
    run.add_callback(At("on_prediction_step", terminate))
    run.train()
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-2"  # not the best one so far, which is the first
    resumed = trainer(**EVERY_STEP, **best)
    resumed.add_callback(losses)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.best_global_step == 2
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


def test_an_evaluation_before_the_first_step_is_not_left(trainer, tmp_path):
    arguments = {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 1}
    run = trainer(**arguments)
    run.add_callback(At("on_prediction_step", once(terminate), step=0))
    run.train()
    assert run.termination.terminated == signal.SIGTERM
    assert evaluated_steps(run) == [0]
    resumed = trainer(**arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert evaluated_steps(resumed) == [0, 1, 1, 2, 3, 4]
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-1"


def test_a_signal_in_a_later_evaluation_ends_the_process_as_ever(trainer):
    run = trainer()
    run.train()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    run.termination.requested = signal.SIGTERM
    assert "eval_loss" in run.evaluate()


def test_a_signal_after_the_last_step_is_for_the_handler_before(trainer):
    got = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    try:
        run = trainer(auto_find_batch_size=True, per_device_train_batch_size=2)
        step, calls = run.training_step, itertools.count()

        def fill_the_memory_once(*args, **kwargs):
            if next(calls) == 0:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return step(*args, **kwargs)

        run.training_step = fill_the_memory_once  # training begins twice
        run.add_callback(At("on_train_end", terminate))
        run.train()
        assert (got, run.state.global_step) == ([signal.SIGTERM], 4)
        terminate()
        assert got == [signal.SIGTERM] * 2
    finally:
        signal.signal(signal.SIGTERM, before)


def test_nohup_keeps_its_effect(trainer):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run = trainer()
        run.add_callback(At("on_step_end", lambda: os.kill(os.getpid(), signal.SIGHUP)))
        run.train()
        assert run.state.global_step == 4
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# In a process of their own: PyTorch raises the error of a dead worker wherever the main process then is.
DEAD_WORKER = """
import multiprocessing.reduction
import os
import signal
import sys

import torch
from torch.utils.data import DataLoader

from binaryvit_hf.data.workers import describe_dead_worker, shield_workers


def kill(tensor):
    os.kill(os.getpid(), signal.SIGKILL)


def fail(tensor):
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")


send = {"kill": kill, "fail": fail}[sys.argv[1]]  # what a worker does instead of sending a batch
multiprocessing.reduction.ForkingPickler._extra_reducers[torch.Tensor] = send
try:
    list(shield_workers(DataLoader([torch.ones(2)], num_workers=1, multiprocessing_context="fork")))
except RuntimeError as error:
    print(describe_dead_worker(error))
"""


@pytest.mark.parametrize(
    "what, reason", [("kill", "killed, as Linux does when memory runs out"), ("fail", "ran out of shared memory")]
)
def test_a_worker_that_dies_is_one_sentence_with_the_remedy(what, reason, warm_python, tmp_path):
    ended = warm_python.run("-c", DEAD_WORKER, what, folder=tmp_path, timeout=60)
    assert reason in ended.stdout, ended.stderr
    assert "--dataloader_num_workers" in ended.stdout


def test_other_ends_of_workers_are_told_apart():
    bus = (
        "DataLoader worker (pid 5) is killed by signal: Bus error. It is possible that dataloader's workers are out of"
    )
    assert "shared memory" in describe_dead_worker(RuntimeError(bus))
    code = "DataLoader worker (pid 5) exited unexpectedly with exit code 3. Details are lost due to multiprocessing."
    assert "exited unexpectedly with exit code 3" in describe_dead_worker(RuntimeError(code))
    assert "exited unexpectedly" in describe_dead_worker(
        RuntimeError("DataLoader worker (pid(s) 5, 6) exited unexpectedly")
    )
    assert describe_dead_worker(RuntimeError("CUDA out of memory")) is None


def test_a_worker_that_hangs_does_not_keep_the_process_from_its_end(warm_python, tmp_path):
    ended = warm_python.run("-c", HANGING_WORKER, folder=tmp_path, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "tensor([0])\n", "")


class ClosedTerminal:
    def write(self, text):
        raise OSError(5, "Input/output error")


def test_a_closed_terminal_does_not_end_a_training(monkeypatch):
    progress, bar = NamedProgress(), ClosedTerminal()
    bar.disable = False
    progress.training_bar = bar
    progress.on_log(None, TrainerState(), None, logs={"loss": 1.0})
    with contextlib.redirect_stderr(ClosedTerminal()):
        assert show_error("message", 3) == 3
