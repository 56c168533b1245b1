"""Files that come with the package: configs, model cards, trained models."""

import os
from pathlib import Path

from .errors import UserError


HUB_CLIENT = "'huggingface_hub>=1.31'"  # in quotes for a shell; the version is that of setup.cfg


def package_version() -> str:
    from importlib import metadata  # takes as long as the rest of `binaryvit --help`

    try:
        return metadata.version("binaryvit_hf")
    except metadata.PackageNotFoundError:  # a clone that is on the path but not installed
        return "not installed"


def installation(extra: str = "") -> str:
    """
    The command that installs the package, for messages; it is not on PyPI.

    Args:
        extra: a group of optional dependencies, such as "train".
    """
    package = f"'.[{extra}]'" if extra else "."
    return f"run `pip install {package}` in a clone of the repository"


def check_torchvision() -> None:
    """
    Raises:
        UserError: torchvision was built for another PyTorch, which would end the import of transformers in a stack trace.
    """
    import importlib
    from importlib import metadata

    try:
        importlib.import_module("torchvision")
    except ImportError:  # transformers works without it
        pass
    except RuntimeError as error:
        torch, torchvision = (metadata.version(name) for name in ("torch", "torchvision"))
        raise UserError(
            f"torchvision {torchvision} does not fit PyTorch {torch} ({error}): install both from the same place, such as "
            "`pip install --force-reinstall torch torchvision --index-url https://download.pytorch.org/whl/cpu`."
        ) from error


def shipped_folder(name: str) -> Path:
    """The folder `configs` or `model_cards`: in binaryvit_hf if that is installed, at the top of a clone."""
    here = Path(__file__).resolve().parent  # binaryvit_runtime beside binaryvit_hf, or binaryvit_hf/runtime in a clone
    return next(folder for folder in (here.parent / "binaryvit_hf" / name, here.parents[1] / name) if folder.is_dir())


def shipped_models() -> dict[str, Path]:
    """Folders of the trained models, by name."""
    return {path.parent.name: path.parent for path in shipped_folder("model_cards").glob("*/model.safetensors")}


def find_source(name: str) -> str:
    """The folder of a trained model that comes with the package, if `name` is one; else `name`, a path or a Hub id."""
    return name if os.path.exists(name) else str(shipped_models().get(name, name))


def shipped_configs() -> dict[str, Path]:
    """Folders of the configs (the rows of the paper and the examples), by their path in `configs`."""
    configs = shipped_folder("configs")
    return {path.parent.relative_to(configs).as_posix(): path.parent for path in configs.rglob("config.json")}


def find_config_path(path: str) -> str:
    """
    The path of a file or folder of configs. `configs/...` is one that comes with the package, if the working directory
    has no such path.
    """
    parts = Path(path).parts
    shipped = shipped_folder("configs").joinpath(*parts[1:])
    return str(shipped) if parts[:1] == ("configs",) and not os.path.exists(path) and shipped.exists() else path
