"""Writes a web page that classifies pictures with a packed model: a static folder, or one HTML file."""

import base64
import contextlib
import hashlib
import html
import json
import os
import re
import shutil
from pathlib import Path
from string import Template
from typing import Any

from ..checkpoint import checkpoint_files
from ..classifier import Classifier
from ..errors import UnsupportedModelError, UserError
from ..packed_model import CONFIG, PROCESSOR, read_json
from ..resources import find_source
from ..sources import RUN_ARGUMENTS
from ..writing import check_writable_file, new_folder, reported_write_errors, write_file


BROWSER = Path(__file__).parent
ENGINE = BROWSER.parent / "engine" / "binaryvit.wasm"
PAGE, STYLE, SCRIPT, WORKER = "index.html", "page.css", "page.js", "worker.js"
NOTICE, NOTICE_FILE = ENGINE.with_name("NOTICE"), "NOTICE.txt"  # licences of what is in the engine
TYPES = "binaryvit.d.ts"  # for users of binaryvit.js, which is in the page's folder
MODEL = "model"  # folder of the model in the folder of the page
GENERATOR = '<meta name="generator" content="binaryvit page">'  # marks files that may be replaced
START_BYTES = 2000  # the mark is among them
OF_DESKTOPS = (".DS_Store", "Thumbs.db", "desktop.ini")  # written into folders that are looked at
EXAMPLES = ("example*.png", "example*.jpg", "example*.jpeg")

# What the page may load. Browsers refuse everything else, such as requests to other servers.
# Workers that start from a Blob URL inherit these rules; those that start from a file do not.
POLICY = "default-src 'none'; img-src data: blob:; base-uri 'none'; form-action 'none'"
FOLDER_POLICY = (
    f"{POLICY}; worker-src 'self' blob:; script-src 'self' 'wasm-unsafe-eval'; style-src 'self'; connect-src 'self'"
)
FILE_POLICY = (
    f"{POLICY}; worker-src blob:; script-src '$script' 'wasm-unsafe-eval'; style-src '$style'; connect-src 'none'"
)

# How a drawing becomes a picture like those of the dataset. `size`: side of the picture in pixels. The others are parts of it:
# `width` and `height` of the box that the drawing fills, and the width of its `stroke`. `stretch`: how far the drawing may
# be stretched to one side to fill the box.
DRAWINGS = {
    "sklearn-digits": {"size": 8, "width": 0.7, "height": 1.0, "stretch": 1.4, "stroke": 0.16},
    "mnist": {"size": 28, "width": 5 / 7, "height": 5 / 7, "stretch": 1.0, "stroke": 0.09},
}
SMALL_PICTURE = 64  # pixels of a side. Datasets of smaller drawings, such as Fashion-MNIST, are white on black.


def write_page(
    model: str | os.PathLike, out: str | os.PathLike, single_file: bool = False, token: str | None = None
) -> None:
    """
    Write a web page that classifies pictures in the browser. It needs no server that computes, and sends nothing.

    Args:
        model: a packed model: a folder, the name of a model that comes with the package, or an id of the Hub.
        out: a new or empty folder, or the folder or file of an earlier page, which is replaced.
        single_file: write one HTML file instead of a folder. It opens from the disk; a folder needs a web server.
        token: of the Hub.

    Raises:
        UserError: the model is damaged or not packed, or `out` is something else than a page, or cannot be written.
    """
    model, out = os.fspath(model), Path(out)
    with reported_write_errors(out):
        check_replaceable(out, single_file)
    try:
        classifier = Classifier.from_pretrained(model, token=token)
    except UnsupportedModelError as error:
        reason = str(error.__cause__ or error).rstrip(".")
        raise UserError(f"The model {model!r} cannot run in a browser: {reason}.") from error
    name, folder = os.path.basename(os.path.abspath(model)), classifier.folder
    if not os.path.exists(find_source(model)):
        download_extras(model, token)
    if single_file:
        write_file(out, single_page(name, classifier))
        return
    with new_folder(out, may_replace=is_page_folder) as staged:
        (staged / MODEL).mkdir()
        for file in model_files(folder):
            shutil.copyfile(file, staged / MODEL / file.name)
        scripts = [BROWSER / SCRIPT, *worker_modules(), BROWSER / TYPES]
        for file in [ENGINE, BROWSER / STYLE, *scripts, *example_files(folder)]:
            shutil.copyfile(file, staged / file.name)
        shutil.copyfile(NOTICE, staged / NOTICE_FILE)
        files = sorted(file.relative_to(staged).as_posix() for file in staged.rglob("*") if file.is_file())
        data = describe_page(name, classifier) | {"files": [PAGE, *files]}
        style, script = f'<link rel="stylesheet" href="{STYLE}">', f'<script src="{SCRIPT}"></script>'
        (staged / PAGE).write_text(
            fill_page(name, FOLDER_POLICY, style, script, data, f"See {NOTICE_FILE}."), encoding="utf-8"
        )


def download_extras(model: str, token: str | None) -> None:
    """Download what the page shows of a model of the Hub and `Classifier` does not need, beside its other files."""
    from huggingface_hub import snapshot_download

    with contextlib.suppress(Exception):  # the page works without them
        snapshot_download(model, token=token, allow_patterns=[RUN_ARGUMENTS, *EXAMPLES])


def check_replaceable(out: Path, single_file: bool) -> None:
    """
    Raises:
        UserError: `out` exists and is something else than an earlier page, or a folder has the name of a file.
    """
    if not single_file and out.suffix.lower() in (".html", ".htm"):
        raise UserError(f"{str(out)!r} is the name of a file: add --single-file, or name a folder.")
    if single_file:
        check_writable_file(out)
    if single_file and out.is_file() and not is_page(out):
        raise UserError(f"{str(out)!r} already exists and is no page: choose another name, or remove it.")
    if not single_file and out.is_dir() and any(out.iterdir()) and not is_page_folder(out):
        raise UserError(f"{str(out)!r} already exists and has other files than a page: choose another name.")


def is_page(file: Path) -> bool:
    """Whether a file was written by `write_page`."""
    try:
        with open(file, "rb") as stream:
            return GENERATOR.encode() in stream.read(START_BYTES)
    except OSError:
        return False


def is_page_folder(folder: Path) -> bool:
    """Whether a folder has a page of `write_page` and nothing else."""
    if not is_page(folder / PAGE):
        return False
    files = list_files((folder / PAGE).read_text(encoding="utf-8", errors="replace"))
    found = [file for file in folder.rglob("*") if file.is_symlink() or not file.is_dir()]
    return all(file.name in OF_DESKTOPS or file.relative_to(folder).as_posix() in files for file in found)


def list_files(page: str) -> set[str]:
    """The files of a folder of `write_page`, from the HTML of its page; none for any other HTML."""
    data = re.search(r'id="page-data">(.*?)</script>', page, re.DOTALL)
    try:
        return set(json.loads(data[1])["files"]) if data else set()
    except (ValueError, KeyError, TypeError):
        return set()


def single_page(name: str, classifier: Classifier) -> str:
    """The page as one HTML file, which has everything in itself."""
    style, script = read(BROWSER / STYLE), read(BROWSER / SCRIPT)
    policy = Template(FILE_POLICY).substitute(script=hash_of(script), style=hash_of(style))
    files = {f"{MODEL}/{file.name}": encode(file) for file in model_files(classifier.folder)}
    files |= {file.name: encode(file) for file in [ENGINE, *example_files(classifier.folder)]}
    content = {"worker": join_modules(worker_modules()), "files": files}
    data = describe_page(name, classifier) | {"content": content}
    return fill_page(name, policy, f"<style>{style}</style>", f"<script>{script}</script>", data, read(NOTICE))


def describe_page(name: str, classifier: Classifier) -> dict[str, Any]:
    """What the page's script must know of the model before the model is loaded."""
    folder = classifier.folder
    dataset = find_dataset(folder)
    # Folders of photos can have names of one character, too: 0 and 1, or grades.
    characters = describe_characters(classifier.labels) if dataset else None
    _, height, width = classifier.network.image_shape
    return {
        "name": name,
        "size": [height, width],
        "labels": len(classifier.labels),
        "characters": characters,
        "drawing": DRAWINGS.get(dataset or "", DRAWINGS["mnist"]) if characters else None,
        "board": "dark" if characters or max(height, width) <= SMALL_PICTURE else "light",
        "probabilities": classifier.scores_are_probabilities,
        "model": [file.name for file in model_files(folder)],
        "examples": [file.name for file in example_files(folder)],
    }


def describe_characters(labels: list[str]) -> str | None:
    """What the labels are: "digits", "letters", other "characters", or `None` for longer labels. The page draws characters."""
    if not all(len(str(label)) == 1 for label in labels):
        return None
    text = "".join(map(str, labels))
    return "digits" if text.isdecimal() else "letters" if text.isalpha() else "characters"


def find_dataset(folder: Path) -> str | None:
    """The name of the dataset that a model was trained on, if the folder still has the arguments of the run."""
    run = read_json(folder / RUN_ARGUMENTS) if (folder / RUN_ARGUMENTS).is_file() else None
    return run.get("dataset_name") if isinstance(run, dict) else None


def model_files(folder: Path) -> list[Path]:
    """The files of a packed model."""
    return [folder / CONFIG, folder / PROCESSOR, *checkpoint_files(folder)]


def example_files(folder: Path) -> list[Path]:
    """Example pictures in the folder of a model."""
    return sorted(file for pattern in EXAMPLES for file in folder.glob(pattern))


def worker_modules() -> list[Path]:
    """The worker's script, after the modules that it imports and those that they import."""
    modules: list[Path] = []

    def visit(module: Path) -> None:
        for imported in re.findall(r'^(?:import|export|\}).* from "\./([\w.-]+)";$', read(module), re.MULTILINE):
            if BROWSER / imported not in modules:
                visit(BROWSER / imported)
        modules.append(module)

    visit(BROWSER / WORKER)
    return modules


def join_modules(modules: list[Path]) -> str:
    """
    ES modules as one classic script.

    Raises:
        ValueError: an `import` or `export` has a form that is not known here, or two modules have the same name at the top.
    """
    return "\n".join(['"use strict";', *map(without_imports, modules)]).replace("import.meta.url", "location.href")


def without_imports(module: Path) -> str:
    text = re.sub(r'^(?:import|export)\s*\{[^{}]*\}\s*from\s*"\./[\w.-]+";$', "", read(module), flags=re.MULTILINE)
    text = re.sub(r"^export (?=(?:async )?function|const|let|class)", "", text, flags=re.MULTILINE)
    text = re.sub(r"^export \{[^{}]*\};$", "", text, flags=re.MULTILINE)
    if unknown := re.search(r"^(?:import|export)\b.*", text, re.MULTILINE):
        raise ValueError(f"{module.name} cannot be joined with other modules: {unknown[0]}")
    return text


def fill_page(name: str, policy: str, style: str, script: str, data: dict, notice: str) -> str:
    return Template(read(BROWSER / "page.html")).substitute(
        generator=GENERATOR,
        policy=policy,
        title=html.escape(name),
        style=style,
        script=script,
        notice=notice,
        data=json.dumps(data).replace("<", r"\u003c"),  # `</script>` in a label would end the element
    )


def hash_of(text: str) -> str:
    """The hash by which a Content-Security-Policy allows a script or style inside of the page."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def encode(file: Path) -> str:
    return base64.b64encode(file.read_bytes()).decode()


def read(file: Path) -> str:
    return file.read_text(encoding="utf-8")
