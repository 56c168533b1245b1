"""What comes with the package: configs of the rows, model cards, trained models."""

from pathlib import Path


def shipped_folder(name: str) -> Path:
    """`configs` or `model_cards`: in a clone beside the package, in an installed package inside of it."""
    package = Path(__file__).parent
    return next(folder for folder in (package / name, package.parent / name) if folder.is_dir())


def shipped_models() -> dict[str, Path]:
    """Trained models that come with the package, by name."""
    return {path.parent.name: path.parent for path in shipped_folder("model_cards").glob("*/model.safetensors")}


def shipped_configs() -> dict[str, Path]:
    """Configs of networks, by their path: the rows of the paper and those of the examples."""
    configs = shipped_folder("configs")
    return {path.parent.relative_to(configs).as_posix(): path.parent for path in configs.rglob("config.json")}
