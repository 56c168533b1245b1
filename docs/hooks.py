"""
What MkDocs writes into the pages: the command reference, results of this repository, and formulas.

- `reference/commands.md` and `reference/training.md` are the text of `--help`.
- Each `configs/NAME/*.md` with its pictures becomes a page of results.
- `$x$` and blocks of the language `math` (LaTeX) become MathML, which browsers show without a library.
"""

import argparse
import html
import importlib.util
import os
import re
from pathlib import Path


ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
HELP_WIDTH = "100"  # characters
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
    for page, source in result_pages().items():
        files.append(File.generated(config, page, abs_src_path=str(source)))
    return files


def on_page_markdown(markdown, page, config, files):
    return replace_formulas(markdown)


# ---- Pages ----


def result_pages() -> dict[str, Path]:
    """The files of results and their pictures, by their place in the site."""
    found = [file for kind in ("*.md", "*.png") for file in sorted(CONFIGS.glob(f"*/{kind}"))]
    return {f"results/{file.relative_to(CONFIGS).as_posix()}": file for file in found}


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
    return "".join(f'<p class="formula">{line}</p>\n' for line in lines) if display == "block" else lines[0]
