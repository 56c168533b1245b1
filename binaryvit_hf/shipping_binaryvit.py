"""A model in the shape in which it lies on the Hub and in a run's folder: packed, its latent weights in a folder beside."""

from pathlib import Path

from transformers.utils.hub import PushToHubMixin

from .quantization_binaryvit import BinaryViTQuantizationConfig


# A folder of the same revision, not a branch: one commit holds both, so they cannot drift apart, and one download brings
# the weights that training goes on from, `from_pretrained(…, subfolder="latent")`.
LATENT = "latent"


class ShippedModel(PushToHubMixin):
    """
    Args:
        model: a latent model of binary weights.
    """

    def __init__(self, model):
        self.model = model

    def save_pretrained(self, folder: str | Path, **kwargs) -> None:
        """Write the packed model to `folder` and the latent one to `folder/latent`; `kwargs` as of a model."""
        self.model.save_pretrained(Path(folder) / LATENT, **kwargs)
        pack_folder(type(self.model), Path(folder) / LATENT, folder, **kwargs)


def pack_folder(model_class: type, latent: str | Path, folder: str | Path, **kwargs) -> None:
    """Load a latent model of `model_class` from the folder `latent` and save it packed to `folder`."""
    packed = model_class.from_pretrained(latent, quantization_config=BinaryViTQuantizationConfig())
    packed.save_pretrained(folder, **kwargs)
