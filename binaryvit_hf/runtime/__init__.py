"""
What runs without PyTorch and transformers: `Classifier`, which classifies pictures with a packed model.

The folder is installed as the package `binaryvit_runtime`, because `import binaryvit_hf` registers the model classes and
so imports PyTorch and transformers. It needs numpy, Pillow and safetensors; for models of the Hub also huggingface_hub.

From top to bottom:

- `classifier` classifies pictures.
- `packed_model` loads a model from its folder: `architecture` reads config.json, `checkpoint` the packed weights, and
  `engine.preprocessing` preprocessor_config.json.
- `engine` computes: C++ behind a C interface.
- `pixels` and `image_files` read and find pictures; `sources`, `hub` and `resources` find models.
- `cpus` counts CPUs and limits spinning threads; `errors` and `writing` serve the whole package.
"""

from typing import TYPE_CHECKING

from .errors import UnsupportedModelError, UserError


if TYPE_CHECKING:
    from .classifier import Answer, Classifier


__all__ = ["Answer", "Classifier", "UnsupportedModelError", "UserError"]


def __getattr__(name: str):
    # Imported when used: `binaryvit --help` imports this package too, and needs neither numpy nor Pillow.
    if name in ("Answer", "Classifier"):
        from . import classifier

        return getattr(classifier, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
