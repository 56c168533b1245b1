"""Training methods beyond the paper's recipe. One argument switches each on; by default all are off."""

from dataclasses import dataclass

from transformers import PreTrainedConfig, TrainerCallback

from binaryvit_runtime.errors import UserError

from ..argument_checks import argument
from .callbacks.averaging import WeightAverage
from .callbacks.oscillation import OscillationFreezing
from .callbacks.sign_gradient import SignGradient


# Files in the checkpoints of a run with an argument. Training cannot resume with it from a checkpoint that lacks the file.
ARGUMENTS_OF_FILES = {"ema_decay": WeightAverage.file, "oscillation_freezing_threshold": OscillationFreezing.file}


@dataclass
class OptionalMethodArguments:
    """Arguments of the optional methods; `callbacks/` holds most of the methods."""

    ema_decay: float | None = argument(
        None,
        "Evaluate, save and upload the exponential moving average of the weights and running statistics, with this "
        "decay per step (timm's ModelEmaV3). It averages about the last 1 / (1 - decay) steps. Default: no average.",
    )
    weight_regularization: float = argument(
        0.0,
        "Add this factor times the mean of |1 - |w|| over all latent 1-bit weights w to the training loss (BNN+, "
        "Darabi et al., 2018). The paper sums instead; the mean begins near 1 for networks of every size.",
    )
    sign_gradient: str = argument(
        "polynomial",
        "Gradient of the sign of an activation x. 'polynomial': 2 - 2|x| on [-1, 1] (Bi-Real Net, Liu et al., "
        "ECCV 2018). 'clip': 1 on [-1, 1] (Hubara et al., NeurIPS 2016). 'tanh': the slope of a tanh that sharpens "
        "during training (IR-Net, Qin et al., CVPR 2020).",
    )
    batch_norm_reestimation_batches: int = argument(
        0,
        "Before each evaluation and for the final model, compute the batch norm statistics as the mean over "
        "this many training batches, augmented but not mixed (Wu & Johnson, 2021; Nagel et al., ICML 2022). 0: use the "
        "running statistics.",
    )
    oscillation_freezing_threshold: float | None = argument(
        None,
        "Freeze 1-bit weights whose sign flips back and forth more often than this, in flips per step, averaged "
        "over about 100 steps (Nagel et al., ICML 2022). Default: no weight is frozen.",
    )

    def check_network(self, config: PreTrainedConfig) -> None:
        """Raise UserError if a method needs 1-bit weights or activations that the config's network lacks."""
        weight_bits, input_bits = (getattr(config, field, 32) for field in ("weight_bits", "input_bits"))
        for name in ("weight_regularization", "oscillation_freezing_threshold"):
            if getattr(self, name) and weight_bits != 1:
                raise UserError(f"--{name} is for networks of 1-bit weights, which this is not.")
        if self.sign_gradient != "polynomial" and input_bits != 1:
            raise UserError(
                f"--sign_gradient {self.sign_gradient} is for networks of 1-bit activations, which this is not."
            )

    def check_packed(self) -> None:
        """Raise UserError if a method changes latent weights or running statistics: a packed network keeps its own."""
        for name in ("weight_regularization", "oscillation_freezing_threshold", "batch_norm_reestimation_batches"):
            if getattr(self, name):
                raise UserError(
                    f"--{name} is for latent weights, but this network is packed: remove the argument, or train the network "
                    "that .dequantize(latent=True) returns."
                )

    def create_callbacks(self) -> list[TrainerCallback]:
        callbacks: list[TrainerCallback] = [SignGradient(self.sign_gradient)]
        if self.oscillation_freezing_threshold is not None:
            callbacks.append(OscillationFreezing(self.oscillation_freezing_threshold))
        if self.ema_decay is not None:
            callbacks.append(WeightAverage(self.ema_decay))
        return callbacks

    @property
    def checkpoint_files(self) -> dict[str, str]:
        """Files that the methods add to every checkpoint, and the argument of each."""
        return {file: name for name, file in ARGUMENTS_OF_FILES.items() if getattr(self, name) is not None}
