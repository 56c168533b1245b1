"""The arguments of a run: dataclasses whose fields are the flags of the command line."""

import os
from dataclasses import dataclass, fields
from inspect import signature
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, Trainer, TrainingArguments, get_scheduler
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from binaryvit_runtime.errors import UserError, did_you_mean, first_sentence

from ..argument_checks import argument, check_ranges
from ..compiled_layers import missing_compiler
from ..data.arguments import DataArguments
from .callbacks.sign_gradient import SIGN_GRADIENTS
from .optional_methods import OptionalMethodArguments


DEFAULT_LICENSE = "apache-2.0"
STEP_SCHEDULES = ("linear", "cosine", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "polynomial")
# Schedules that follow the evaluations. Each has a state of its own.
SCHEDULES_BY_METRICS = ("reduce_lr_on_plateau", "greedy")
BEST_METRICS = ("loss", "accuracy", "top5_accuracy")
COMPILE_MODES_WITH_GRAPHS = ("reduce-overhead", "max-autotune")  # of torch.compile
# Arguments of transformers' Trainer that must keep their defaults; the help leaves them out.
UNSUPPORTED = {
    "use_liger_kernel": "it is for language models",
    "liger_kernel_config": "it is for language models",
    "batch_eval_metrics": "accuracy is computed from all images at once",
    "eval_do_concat_batches": "accuracy is computed from all images at once",
    "prediction_loss_only": "every evaluation ends with the accuracy",
    "label_names": "batches have their labels in 'labels'",
    "train_sampling_strategy": "training shuffles the images",
    "neftune_noise_alpha": "it is for word embeddings",
}


@dataclass
class ModelArguments:
    """Arguments that choose the network and its teacher."""

    model_name_or_path: str | None = argument(
        None, "Trained model to fine-tune or evaluate: a Hub id, a path, binaryvit-digits or binaryvit-fashion-mnist."
    )
    subfolder: str = argument(
        "",
        "Folder of the model's repository to load from. Training finds the latent weights of a packed model without it.",
    )
    config_name: str | None = argument(None, "Network to train from scratch: a row of configs/, a path or a Hub id.")
    config_overrides: str | None = argument(
        None,
        "Config fields of the new network to change, such as weight_bits=32 for the first of two stages: binary "
        "activations, full-precision weights (ReActNet, Liu et al., ECCV 2020; Martinez et al., ICLR 2020).",
    )
    init_from: str | None = argument(
        None,
        "Initialise the new network with the latent weights of this model, a Hub id or a path: the second of two "
        "stages, or fine-tuning at another size with --config_overrides image_size=320, which resizes the position "
        "embeddings. All other shapes must equal the shapes of --config_name (default: this model's config); bits may "
        "differ.",
    )
    teacher_model_name_or_path: str | None = argument(
        None, "Teacher to distil from: a Hub id or a path. Default: no teacher, train on the labels."
    )
    drop_path_rate: float | None = argument(
        None,
        "Stochastic depth: probability that the last layer's branches are dropped. It grows linearly from 0 with "
        "depth (Huang et al., ECCV 2016). Default: the config's.",
    )
    ignore_mismatched_sizes: bool = argument(False, "Start a new head if the model's head is for other labels.")
    cache_dir: str | None = argument(None, "Folder for downloads. Default: Hugging Face's cache.")
    token: str | None = argument(
        None, "Token of the Hub, also for uploads if there is no --hub_token. Default: the last login's."
    )
    trust_remote_code: bool = argument(False, "Run code from the repositories of models on the Hub.")
    license: str = argument(DEFAULT_LICENSE, "Licence of the trained weights, for the model card.")

    def __post_init__(self):
        check_ranges(self)
        if self.init_from and not (self.config_name or self.model_name_or_path):
            self.config_name = self.init_from


@dataclass
class DistillationTrainingArguments(OptionalMethodArguments, TrainingArguments):
    """
    `TrainingArguments` with arguments for distillation, learning rate scaling, repeated augmentation, packing and the
    optional methods. Gradients are not clipped by default, as in the paper's runs.
    """

    label_loss_weight: float | None = argument(
        None,
        "Share of the cross-entropy with the labels in the distillation loss, from 0 to 1. "
        "Default: 0, or 0.1 if mixup or CutMix make the labels soft.",
    )
    distillation_temperature: float = argument(
        1.0, "Temperature of student and teacher in the distillation loss, which is scaled by its square."
    )
    max_grad_norm: float = argument(
        0.0,
        "Clip the gradient at this norm; 0, as in the paper's runs, does not. transformers' default is 1, and so is that of "
        "the recipes for photos and Fashion-MNIST.",
    )
    learning_rate_batch_size: int | None = argument(
        None,
        "Batch size for which --learning_rate is given. The rate is scaled linearly to this run's batch, counting "
        "all processes and accumulated steps. Default: not scaled.",
    )
    lr_schedule_per_epoch: bool = argument(
        False, "Change the learning rate once per epoch, as in the paper's runs, not at every step."
    )
    repeated_augmentations: int = argument(
        1, "Show each image this many times in neighbouring batches, with another augmentation each time."
    )
    balance_classes: bool = argument(
        False,
        "Show every class equally often in training, for folders with few images of some classes: their images repeat "
        "with other augmentations. It applies to teacher and student.",
    )
    save_packed: bool = argument(
        True,
        "Save a trained binary network packed, one bit per weight, and its latent float weights in the folder "
        "'latent'. --no_save_packed saves the latent weights only.",
    )
    torch_compile: str = argument(  # type: ignore[assignment]
        "false",
        "Compile the layers for training steps: 'true', 'false', or 'auto', which times a few steps and compiles if that "
        "saves more time than it takes. Compiled steps equal eager ones up to rounding. It needs a C++ compiler, on a GPU "
        "Triton.",
        nargs="?",
        const="true",
    )
    cuda_graphs: str = argument(
        "false",
        "Record the kernels of a training step once as a CUDA graph, and launch them together: 'true', 'false', or 'auto', "
        "which does so where it is possible. Small networks train several times as fast, and weights are the same. It needs "
        "one NVIDIA GPU, and memory for the activations of one more batch, of two with --mixup_prob below 1.",
        nargs="?",
        const="true",
    )
    logging_nan_inf_filter: bool = argument(
        False, "Off: a loss that is not finite ends the run. The filter makes every step wait for the GPU."
    )
    remove_unused_columns: bool = argument(False, "Off: images are decoded and transformed as they are read.")

    resume_from_checkpoint: str | None = argument(
        None,
        "Resume from this checkpoint. Without a value or with 'true': from the last one in --output_dir. Other "
        "arguments may have new values, with exceptions: --optim stays the same, --lr_scheduler_type does not change to or from "
        + " or ".join(SCHEDULES_BY_METRICS)
        + ", and --ema_decay and --oscillation_freezing_threshold cannot be added. A finished teacher is not trained again. "
        "Default: the same command resumes by itself.",
        nargs="?",
        const="true",
    )

    def __post_init__(self):
        check_ranges(self)
        if self.output_dir == "":
            raise UserError("--output_dir is empty; name a folder.")
        self.cuda_graphs = read_choice("cuda_graphs", self.cuda_graphs)  # type: ignore[assignment]
        compiles, backend, mode = self.read_compilation()
        if compiles and not (self.fsdp or self.deepspeed):
            # transformers would warn on CPUs, and train in TF32 on GPUs, which is not what eager steps do.
            self.torch_compile, self.torch_compile_backend, self.torch_compile_mode = False, None, None
            super().__post_init__()
            self.torch_compile, self.torch_compile_backend, self.torch_compile_mode = compiles, backend, mode
        else:
            self.torch_compile = compiles is True
            super().__post_init__()
        self.output_dir = os.path.normpath(self.output_dir)
        self.check_reporting()
        # PyTorch warns about pinned memory for other devices than these.
        self.dataloader_pin_memory = self.dataloader_pin_memory and self.device.type not in ("cpu", "mps")
        if self.lr_schedule_per_epoch and (self.max_steps > 0 or self.lr_scheduler_type not in STEP_SCHEDULES):
            raise ValueError(
                "--lr_schedule_per_epoch needs --num_train_epochs, not --max_steps, and an --lr_scheduler_type that is a "
                f"function of the step: {', '.join(STEP_SCHEDULES)}."
            )
        if self.auto_find_batch_size and self.learning_rate_batch_size is not None:
            raise UserError(
                "--auto_find_batch_size changes the batch after --learning_rate_batch_size has scaled the learning rate: leave "
                "one of them out."
            )
        if self.sign_gradient not in SIGN_GRADIENTS:
            raise UserError(
                f"--sign_gradient must be one of {', '.join(SIGN_GRADIENTS)}, not {self.sign_gradient!r}"
                + did_you_mean(self.sign_gradient, SIGN_GRADIENTS)
            )

    def read_compilation(self) -> tuple[bool | str, str, str | None]:
        """
        Whether to compile, True, False or "auto", and torch.compile's backend and mode. A backend or a mode without
        `--torch_compile` compiles, as in transformers.

        Raises:
            UserError: `--torch_compile` has another value.
        """
        choice = read_choice("torch_compile", self.torch_compile)
        backend, mode = self.torch_compile_backend, self.torch_compile_mode
        return choice or bool(backend or mode), backend or "inductor", mode

    def check_reporting(self) -> None:
        """Raise UserError if `report_to` has a name that transformers does not know, or whose package is not installed."""
        for name in self.report_to:
            if name not in INTEGRATION_TO_CALLBACK:
                raise UserError(
                    f"--report_to must be none, all or some of {', '.join(INTEGRATION_TO_CALLBACK)}, not {name}"
                    + did_you_mean(name, INTEGRATION_TO_CALLBACK)
                )
            if name not in [*get_available_reporting_integrations(), "flyte"]:  # transformers does not look for flyte
                raise UserError(
                    f"--report_to {name}: its package is not installed; install it, or give --report_to none."
                )

    def check_supported(self) -> None:
        """Raise UserError if an argument of transformers' Trainer has a value that training does not support."""
        defaults = {field.name: field.default for field in fields(self)}
        for name, reason in UNSUPPORTED.items():
            value = getattr(self, name, None)
            if name in defaults and value != defaults[name]:
                raise UserError(f"--{name} {value} is not supported: {reason}.")
        if self.max_steps == 0:
            raise UserError("--max_steps 0 trains nothing: leave it out, or give the number of steps.")
        if self.dataloader_persistent_workers and self.dataloader_num_workers == 0:
            raise UserError("--dataloader_persistent_workers needs workers: give --dataloader_num_workers 1 or more.")
        if self.cuda_graphs is True and (obstacle := self.graphs_obstacle()):
            raise UserError(f"--cuda_graphs needs {obstacle}; leave it out, or give --cuda_graphs auto.")
        compiles = self.torch_compile is True and self.torch_compile_backend == "inductor"
        if compiles and (missing := missing_compiler(self.device)):
            raise UserError(f"--torch_compile needs {missing}: install it, or give --torch_compile auto.")
        metric = self.metric_for_best_model
        if metric is not None and metric.removeprefix("eval_") not in BEST_METRICS:
            raise UserError(
                f"--metric_for_best_model must be one of {', '.join(BEST_METRICS)}, not {metric!r}"
                + did_you_mean(metric, BEST_METRICS)
            )

    def check_checkpointing(self, network: PreTrainedModel) -> None:
        """Raise UserError if `--gradient_checkpointing_kwargs` are unknown, or the network refuses them or checkpointing."""
        given = self.gradient_checkpointing_kwargs or {}
        if not self.gradient_checkpointing:
            return
        if not isinstance(given, dict):
            raise UserError(f"--gradient_checkpointing_kwargs must be an object, not {given!r}.")
        # Before transformers 5.24 it has another name.
        enable = getattr(network, "activation_checkpointing_enable", network.gradient_checkpointing_enable)
        of_trainer = {"every_n_layers", "offload"} & signature(enable).parameters.keys()
        parameters = signature(checkpoint).parameters.values()
        known = [*sorted(of_trainer), *(each.name for each in parameters if each.kind is each.KEYWORD_ONLY)]
        for name in given:
            if name not in known:
                raise UserError(
                    f"--gradient_checkpointing_kwargs has no {name!r}; it has {', '.join(known)}{did_you_mean(name, known)}"
                )
        try:
            enable({name: value for name, value in given.items() if name not in of_trainer})
        except ValueError as error:
            raise UserError(f"--gradient_checkpointing is refused: {first_sentence(error)}") from error
        getattr(network, "activation_checkpointing_disable", network.gradient_checkpointing_disable)()

    def graphs_obstacle(self) -> str | None:
        """What training steps lack to run as CUDA graphs; `None` if they lack nothing."""
        if self.device.type != "cuda":
            return "an NVIDIA GPU"
        if self.world_size > 1 or self.fsdp or self.deepspeed:
            return "a run on one GPU"
        if self.fp16:  # its gradients are scaled after they are computed, when small ones are lost
            return "float32 or --bf16"
        if self.gradient_checkpointing:  # it reads and restores random generators
            return "a run without --gradient_checkpointing"
        if self.torch_compile and (
            self.torch_compile_mode in COMPILE_MODES_WITH_GRAPHS or self.torch_compile_backend == "cudagraphs"
        ):
            return "compiled code that makes no CUDA graphs itself, such as that of --torch_compile_mode default"
        return None

    def wants_graphs(self) -> bool | str:
        """`--cuda_graphs`; False for "auto" where they are not possible."""
        return False if self.cuda_graphs is False or self.graphs_obstacle() else self.cuda_graphs

    def check_optimization(self) -> None:
        """Try the optimiser and the schedule on one weight; raise UserError if they fail."""
        if self.optim_target_modules is not None:  # needs a whole model
            return
        try:
            weight, steps = nn.Parameter(torch.zeros(1, 1, device=self.device)), 100
            optimizer_class, kwargs = Trainer.get_optimizer_cls_and_kwargs(self)
            optimizer = optimizer_class([weight], **kwargs)
            warmup = self.get_warmup_steps(steps)
            get_scheduler(self.lr_scheduler_type, optimizer, warmup, steps, self.lr_scheduler_kwargs)
        except Exception as error:  # optimisers and schedules raise any kind of error
            raise UserError(
                f"--optim {self.optim.value} or --lr_scheduler_type {self.lr_scheduler_type.value} fails with the given "
                f"--optim_args and --lr_scheduler_kwargs: {first_sentence(error)}"
            ) from error

    @property
    def n_gpu(self) -> int:
        """
        At most 1. For more GPUs of one process the Trainer would multiply the recipe's batch, and nn.DataParallel would
        normalise each GPU's images apart.
        """
        return min(super().n_gpu, 1)

    @property
    def effective_batch_size(self) -> int:
        """Images per step of the optimiser, over all processes and accumulated steps."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size

    @property
    def sampling_seed(self) -> int:
        return self.data_seed if self.data_seed is not None else self.seed

    @property
    def scaled_learning_rate(self) -> float:
        if self.learning_rate_batch_size is None:
            return self.learning_rate
        return self.learning_rate * self.effective_batch_size / self.learning_rate_batch_size


class RunArguments(NamedTuple):
    """All arguments of one run: a teacher's or a student's."""

    model: ModelArguments
    data: DataArguments
    training: DistillationTrainingArguments


def read_choice(name: str, value: str) -> bool | str:
    """
    The value of an argument that is true, false or auto: True, False or "auto".

    Raises:
        UserError: it has another value.
    """
    words: dict[str, bool | str] = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    choice = (words | {"auto": "auto"}).get(str(value).lower())
    if choice is None:
        raise UserError(f"--{name} must be true, false or auto, not {value!r}.")
    return choice
