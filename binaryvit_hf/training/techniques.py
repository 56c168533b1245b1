"""Ways to train that are no part of the paper's recipe: off unless asked for, one argument each."""

from dataclasses import dataclass, field

from transformers import PreTrainedConfig, TrainerCallback

from ..errors import UserError
from .callbacks.averaging import WeightAverage
from .callbacks.oscillation import OscillationFreezing
from .callbacks.sign_gradient import SIGN_GRADIENTS, SignGradient
from .checkpoints import CheckpointedCallback


@dataclass
class TrainingOptions:
    ema_decay: float | None = field(
        default=None,
        metadata={
            "help": "Evaluate, save and upload the moving average of the weights and statistics, of this decay a step (timm's "
            "ModelEmaV3; about the last 1 / (1 - decay) steps). Default: the weights themselves."
        },
    )
    weight_regularization: float = field(
        default=0.0,
        metadata={
            "help": "Add this times the mean of |1 - |w|| over all latent 1-bit weights w to the training loss (BNN+, Darabi "
            "et al., 2018). A mean, not the paper's sum: it begins near 1 in networks of every size, so the factor is a share "
            "of the loss; its pull on each weight is this over their number."
        },
    )
    sign_gradient: str = field(
        default="polynomial",
        metadata={
            "help": "Gradient of the sign of an activation x: 'polynomial', 2 - 2|x| inside of [-1, 1] (Bi-Real Net, Liu et "
            "al., ECCV 2018); 'clip', 1 there (Hubara et al., NeurIPS 2016); 'tanh', of a tanh that steepens over the training "
            "(IR-Net, Qin et al., CVPR 2020)."
        },
    )
    batch_norm_reestimation_batches: int = field(
        default=0,
        metadata={
            "help": "Before each evaluation and for the final model take the statistics of batch normalisation anew, as the "
            "mean over this many training batches, augmented but not mixed (Wu & Johnson, 2021; Nagel et al., ICML 2022). "
            "0: the running ones."
        },
    )
    oscillation_freezing_threshold: float | None = field(
        default=None,
        metadata={
            "help": "Freeze 1-bit weights whose sign flips to and fro more often than this, in flips a step, averaged over "
            "about 100 steps (Nagel et al., ICML 2022). Default: none is frozen."
        },
    )

    def check_options(self) -> None:
        """
        Raises:
            UserError: an option has no meaning.
        """
        if self.sign_gradient not in SIGN_GRADIENTS:
            raise UserError(f"--sign_gradient must be one of {', '.join(SIGN_GRADIENTS)}, not {self.sign_gradient!r}.")

    def check_network(self, config: PreTrainedConfig) -> None:
        """
        Raises:
            UserError: an option is for other networks than that of this config.
        """
        weight_bits, input_bits = (getattr(config, field, 32) for field in ("weight_bits", "input_bits"))
        for option in ("weight_regularization", "oscillation_freezing_threshold"):
            if getattr(self, option) and weight_bits != 1:
                raise UserError(f"--{option} is for networks of 1-bit weights, which this is not.")
        if self.sign_gradient != "polynomial" and input_bits != 1:
            raise UserError(
                f"--sign_gradient {self.sign_gradient} is for networks of 1-bit activations, which this is not."
            )

    def create_callbacks(self) -> list[TrainerCallback]:
        callbacks: list[TrainerCallback] = [SignGradient(self.sign_gradient)]
        if self.oscillation_freezing_threshold is not None:
            callbacks.append(OscillationFreezing(self.oscillation_freezing_threshold))
        if self.ema_decay is not None:
            callbacks.append(WeightAverage(self.ema_decay))
        return callbacks

    @property
    def checkpoint_files(self) -> list[str]:
        """What a checkpoint holds for the options, beside what every checkpoint holds."""
        return [callback.file for callback in self.create_callbacks() if isinstance(callback, CheckpointedCallback)]
