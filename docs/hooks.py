"""
What MkDocs adds to the pages: the command reference, results of this repository, pictures and formulas.

- `<!-- commands -->` and `<!-- training -->` become the text of `--help`.
- Each `configs/NAME/*.md` becomes a page of results, with the command that makes it, and so does each card of a trained model.
- A `<picture>` of `docs/pictures` for a light and a dark page follows the switch of the site. On GitHub it stands as it is.
- `$x$` and blocks of the language `math` (LaTeX) become MathML, which browsers show without a library.
"""

import argparse
import html
import importlib.util
import os
import re
import textwrap
from pathlib import Path


ROOT = Path(__file__).parents[1]
CONFIGS, CARDS = ROOT / "configs", ROOT / "model_cards"
CURVES = "learning_curves.png"
PICTURES = ROOT / "docs" / "pictures"
HELP_WIDTH = "96"  # characters
COMMANDS, ARGUMENTS = "<!-- commands -->", "<!-- training -->"
PICTURE = re.compile(
    r'<picture>\s*<source [^>]*srcset="(?P<dark>[^"]+)">\s*'
    r'<img src="(?P<light>[^"]+)" width="(?P<width>\d+)" alt="(?P<text>[^"]+)">\s*</picture>'
)
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
    """Adds the pages of results, and pictures."""
    from mkdocs.structure.files import File

    for page, source in (result_pages() | pictures()).items():
        files.append(File.generated(config, page, abs_src_path=str(source)))
    return files


def on_page_markdown(markdown, page, config, files):
    if page.file.src_uri in result_pages():
        page.meta["hide"] = ["toc"]  # the tables are wide
        source = result_pages()[page.file.src_uri]
        if source.is_relative_to(CONFIGS):
            markdown += how_to_repeat(source)
        markdown = markdown.replace("<details>", '<details markdown="1">')
    for mark, make in {COMMANDS: command_reference, ARGUMENTS: training_reference}.items():
        if mark in markdown:
            markdown = markdown.replace(mark, make())
    return replace_formulas(PICTURE.sub(as_two_pictures, markdown))


# ---- Pages ----


def result_pages() -> dict[str, Path]:
    """Tables of `configs`, cards of trained models, and the pictures of both, by their place in the site."""
    found = [file for kind in ("*.md", "*.png") for file in sorted(CONFIGS.glob(f"*/{kind}"))]
    pages = {f"results/{file.relative_to(CONFIGS).as_posix()}": file for file in found}
    for card in sorted(CARDS.glob("*/README.md")):
        pages[f"results/{card.parent.name}/card.md"] = card
        pages[f"results/{card.parent.name}/{CURVES}"] = card.with_name(CURVES)
    return pages


def how_to_repeat(results: Path) -> str:
    """The command that wrote a page of results, if an ablation did."""
    name, table_file = results.parent.name, results.with_suffix(".json")
    if results.stem != "results" and not table_file.is_file():
        return ""
    table = "" if results.stem == "results" else f" --table {table_file.name}"
    command = f"binaryvit ablation configs/{name} outputs/{name}{table}{seeds_of(results)}"
    return (
        f"\n\n## How to repeat it\n\n```bash\n{command}\n```\n\n[The guide](../../guides/ablation.md) explains it.\n"
    )


def seeds_of(results: Path) -> str:
    """The argument of the seeds of a table: from 1 to the largest number in its column "seeds". Empty without a table."""
    rows = []
    if results.is_file():
        lines = results.read_text(encoding="utf-8").splitlines()
        rows = [[cell.strip() for cell in line.split(" | ")] for line in lines if line.startswith("| ")]
    if not rows or "seeds" not in rows[0]:
        return ""
    column = rows[0].index("seeds")
    most = max((int(row[column]) for row in rows[2:]), default=0)
    return f" --seeds {' '.join(str(seed + 1) for seed in range(most))}" if most else ""


def pictures() -> dict[str, Path]:
    return {f"pictures/{file.name}": file for file in sorted(PICTURES.iterdir())}


def as_two_pictures(picture: re.Match) -> str:
    """Markdown of a `<picture>`: the theme shows one of the two. The site has the pictures one folder higher."""
    shown = []
    for theme in ("light", "dark"):
        place = picture[theme].replace("../pictures/", "pictures/", 1)
        shown.append(f"![{picture['text']}]({place}#only-{theme}){{ width={picture['width']} }}")
    return "\n".join(shown)


def command_reference() -> str:
    from binaryvit_cli import GROUPS, create_command_parser

    os.environ["COLUMNS"] = HELP_WIDTH
    parser = create_command_parser()
    [commands] = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    sections = [as_block(parser.format_help())]
    for title, names in GROUPS.items():
        sections.append(f"## {title[0].upper()}{title[1:]}")
        sections += [f"### {name}\n\n{as_block(commands.choices[name].format_help())}" for name in names]
    return "\n\n".join(sections) + "\n"


def training_reference() -> str:
    if importlib.util.find_spec("torch") is None:  # transformers' own arguments are part of the help
        return "It needs PyTorch, which was not installed when this page was made."
    from binaryvit_hf.training import help as training_help

    os.environ["COLUMNS"] = HELP_WIDTH
    training_help.program = lambda: f"python -m {TRAINING}"  # else the program that builds the site
    sections = []
    for section in training_help.full_help().split("\n\n"):
        title, _, body = section.partition(":\n")
        is_group = title in training_help.GROUPS
        sections.append(f"## {title}\n\n{as_block(textwrap.dedent(body))}" if is_group else as_block(section))
    return "\n\n".join(sections)


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
