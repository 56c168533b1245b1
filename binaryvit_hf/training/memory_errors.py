"""Errors of a full memory, as one sentence with the arguments that need less of it."""

import contextlib
import re
from collections.abc import Callable, Iterator

import torch
from transformers import TrainingArguments

from binaryvit_runtime.errors import counted


# Messages of PyTorch, which has a class of its own for the allocator of a GPU alone; the last one is of --auto_find_batch_size.
FULL_MEMORY = re.compile(
    r"out of memory|can't allocate memory|CUBLAS_STATUS_ALLOC_FAILED|No executable batch size found"
)


class FullMemoryError(RuntimeError):
    """The memory does not hold a batch. Commands print only the message and exit with code 1."""


def is_full_memory(error: BaseException) -> bool:
    if isinstance(error, FullMemoryError):
        return False  # it has its sentence
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and bool(FULL_MEMORY.search(str(error)))
    )


def describe_full_memory(error: BaseException, device: torch.device) -> str:
    """`The GPU's memory` or `The machine's memory`, which can also be full while a GPU trains."""
    of_machine = device.type == "cpu" or isinstance(error, MemoryError) or "CPUAllocator" in str(error)
    return "The machine's memory" if of_machine else "The GPU's memory"


def training_memory_error(error: BaseException, device: torch.device, batch_size: int, more: str) -> FullMemoryError:
    """
    The error of a training batch that is too large.

    Args:
        more: what to give beside a smaller batch, so that the run goes on; empty if nothing.
    """
    sentence = (
        f"{describe_full_memory(error, device)} does not hold a training batch of {counted(batch_size, 'image')}"
    )
    if batch_size == 1:
        return FullMemoryError(f"{sentence}: choose a smaller network, or smaller images.")
    remedy = (
        "run the same command with a smaller --per_device_train_batch_size, and more --gradient_accumulation_steps"
    )
    return FullMemoryError(f"{sentence}: {remedy} for as many images per step{more and f', and {more}'}.")


def evaluation_memory_error(error: BaseException, device: torch.device, batch_size: int) -> FullMemoryError:
    return FullMemoryError(
        f"{describe_full_memory(error, device)} does not hold an evaluation batch of {counted(batch_size, 'image')}: run the "
        "same command again with a smaller --per_device_eval_batch_size; it resumes from the last checkpoint, if there is one."
    )


@contextlib.contextmanager
def memory_errors(create: Callable[[BaseException], FullMemoryError]) -> Iterator[None]:
    """
    Raises:
        FullMemoryError: what `create` makes of an error of a full memory inside.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_full_memory(error):
            raise
        raise create(error) from error


def evaluation_memory_errors(arguments: TrainingArguments) -> contextlib.AbstractContextManager[None]:
    """`memory_errors` of an evaluation with these arguments."""
    return memory_errors(lambda error: evaluation_memory_error(error, arguments.device, arguments.eval_batch_size))
