"""
What MkDocs writes into the pages: the command reference, results of this repository, pictures and formulas.

- `reference/commands.md` and `reference/training.md` are the text of `--help`.
- Each `configs/NAME/*.md` with its pictures becomes a page of results, with the command that makes it.
- `<!-- forwards -->` becomes the table of `docs/measurements/forwards.json`.
- `$x$` and blocks of the language `math` (LaTeX) become MathML, which browsers show without a library.
"""

import argparse
import html
import importlib.util
import json
import os
import re
from collections import defaultdict
from pathlib import Path


ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
MEASUREMENTS, PICTURES = ROOT / "docs" / "measurements", ROOT / "docs" / "pictures"
FORWARDS = "<!-- forwards -->"
HELP_WIDTH = "96"  # characters
TRAINING = "binaryvit_hf.training"
FORMULA_BLOCK = re.compile(r"^```math\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# A formula in a line of text. Code may have dollars: `$HOME`.
CODE_OR_FORMULA = re.compile(r"(^```.*?^```$|`[^`\n]+`)|\$([^$\n]+)\$", re.DOTALL | re.MULTILINE)


def on_config(config):
    """Lists the pages of results."""
    [section] = [entry for entry in config.nav if isinstance(entry, dict) and "Results" in entry]
    section["Results"] += [page for page in result_pages() if page.endswith(".md")]
    return config


def on_files(files, config):
    """Adds the pages that are made of help texts and results."""
    from mkdocs.structure.files import File

    os.environ["COLUMNS"] = HELP_WIDTH
    files.append(File.generated(config, "reference/commands.md", content=command_reference()))
    files.append(File.generated(config, "reference/training.md", content=training_reference()))
    for page, source in (result_pages() | pictures()).items():
        files.append(File.generated(config, page, abs_src_path=str(source)))
    return files


def on_page_markdown(markdown, page, config, files):
    if page.file.src_uri in result_pages():
        page.meta["hide"] = ["toc"]  # the tables are wide
        markdown += how_to_repeat(result_pages()[page.file.src_uri])
    return replace_formulas(markdown.replace(FORWARDS, forwards_table()))


# ---- Pages ----


def result_pages() -> dict[str, Path]:
    """The files of results and their pictures, by their place in the site."""
    found = [file for kind in ("*.md", "*.png") for file in sorted(CONFIGS.glob(f"*/{kind}"))]
    return {f"results/{file.relative_to(CONFIGS).as_posix()}": file for file in found}


def how_to_repeat(results: Path) -> str:
    """The command that wrote a page of results."""
    name = results.parent.name
    table = "" if results.stem == "results" else f" --table {results.stem}.json"
    command = f"binaryvit ablation configs/{name} outputs/{name}{table}"
    return (
        f"\n\n## How to repeat it\n\n```bash\n{command}\n```\n\n[The guide](../../guides/ablation.md) explains it.\n"
    )


def pictures() -> dict[str, Path]:
    return {f"pictures/{file.name}": file for file in sorted(PICTURES.iterdir())}


def forwards_table() -> str:
    """Milliseconds per image of all networks and engines, a column for each number of threads and size of batches."""
    results = json.loads((MEASUREMENTS / "forwards.json").read_text(encoding="utf-8"))["results"]
    settings = sorted({(result["batch_size"], result["threads"]) for result in results})
    rows: dict[tuple[str, str], dict[tuple[int, int], dict]] = defaultdict(dict)
    for result in results:
        rows[result["model"], result["engine"]][result["batch_size"], result["threads"]] = result
    head = [f"{threads} thread{'s' * (threads > 1)}, {images_at_once(batch)}" for batch, threads in settings]
    lines = [["network", "engine", *head, "file"], ["---"] * (len(settings) + 3)]
    for (model, engine), times in rows.items():
        cells = [milliseconds_per_image(times[setting]) if setting in times else "" for setting in settings]
        size = next(iter(times.values()))["file_bytes"]
        lines.append([f"`{model}`", engine, *cells, f"{size / 1e6:.3g} MB" if size else ""])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def milliseconds_per_image(result: dict) -> str:
    milliseconds = 1000 * result["seconds"] / result["batch_size"]
    return f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.1f}"


def images_at_once(batch: int) -> str:
    return "one image" if batch == 1 else f"batches of {batch}"


def command_reference() -> str:
    from binaryvit_cli import GROUPS, create_command_parser

    parser = create_command_parser()
    [commands] = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    sections = [
        "# The command line\n\nThis page is the text of `binaryvit --help` and of `binaryvit COMMAND --help`.",
        as_block(parser.format_help()),
    ]
    for title, names in GROUPS.items():
        sections.append(f"## {title[0].upper()}{title[1:]}")
        sections += [f"### {name}\n\n{as_block(commands.choices[name].format_help())}" for name in names]
    return "\n\n".join(sections) + "\n"


def training_reference() -> str:
    head = "# Training\n\nThis page is the text of `python -m binaryvit_hf.training --help`."
    if importlib.util.find_spec("torch") is None:  # transformers' own arguments are part of the help
        return f"{head} It needs PyTorch, which was not installed when this page was made.\n"
    from binaryvit_hf.training import help as training_help

    training_help.program = lambda: f"python -m {TRAINING}"  # else the program that builds the site
    return f"{head}\n\n{as_block(training_help.full_help())}\n"


def as_block(text: str) -> str:
    return f"```text\n{text.strip()}\n```"


# ---- Formulas ----


def replace_formulas(markdown: str) -> str:
    markdown = FORMULA_BLOCK.sub(lambda found: to_mathml(found[1], "block"), markdown)
    return CODE_OR_FORMULA.sub(lambda found: found[1] or to_mathml(html.unescape(found[2]), "inline"), markdown)


def to_mathml(formula: str, display: str) -> str:
    from latex2mathml.converter import convert

    lines = [convert(line, display=display) for line in formula.strip().splitlines()]
    if display == "inline":
        return f"<span>{lines[0]}</span>"  # Markdown takes <math> at the start of a line for a block
    return "".join(f'<p class="formula">{line}</p>\n' for line in lines)
