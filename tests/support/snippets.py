"""The code in README.md and in the pages of `docs`."""

import re
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).parents[2]
README, PAGES = ROOT / "README.md", ROOT / "docs" / "pages"
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\S*)[^\n]*\n(?P<text>.*?)^(?P=indent)```$", re.DOTALL | re.MULTILINE
)
IN_SENTENCE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
OF_THE_HUB = "me/photos"
IN_NODE = "./site/"  # in JavaScript


@dataclass(frozen=True)
class Snippet:
    """
    A block of code.

    Args:
        page: the file, from the root of the repository.
        line: of its first line of code.
        is_output: whether it stands right below a block, whose output it is.
    """

    page: str
    line: int
    language: str
    text: str
    is_output: bool = False

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def read_snippets(file: Path) -> list[Snippet]:
    content, page = file.read_text(encoding="utf-8"), file.relative_to(ROOT).as_posix()
    snippets, end = [], 0
    for found in FENCE.finditer(content):
        line = content.count("\n", 0, found.start("text")) + 1
        is_output = bool(snippets) and found["language"] == "text" and not content[end : found.start()].strip()
        snippets.append(Snippet(page, line, found["language"], textwrap.dedent(found["text"]), is_output))
        end = found.end()
    return snippets


def code_in_sentences(file: Path) -> list[str]:
    """The code between single backticks."""
    return IN_SENTENCE.findall(FENCE.sub("", file.read_text(encoding="utf-8")))


# By page, in the order of the page.
SNIPPETS = {file: read_snippets(file) for file in (README, *sorted(PAGES.rglob("*.md")))}


def snippets_in(language: str) -> list[Snippet]:
    """Each text once: README.md may repeat one of a page."""
    found = {snippet.text: snippet for snippets in SNIPPETS.values() for snippet in snippets}
    return [snippet for snippet in found.values() if snippet.language == language]


def snippet_with(words: str) -> str:
    """The Python of the pages that has these words. README.md may have a shorter one."""
    [snippet] = [each for each in snippets_in("python") if words in each.text and each.page != README.name]
    return snippet.text


def split_commands(text: str) -> list[list[str]]:
    """The words of each command of a shell snippet, without comments. Variables are 1."""
    text = re.sub(r"\$\w+", "1", text.replace("\\\n", " "))
    commands: list[list[str]] = []
    for line in text.splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars=True)
        words.whitespace_split = True
        command: list[str] = []
        for word in [*words, "&&"]:
            if word == "&&":
                commands += [command] if command else []
                command = []
            else:
                command.append(word)
    return commands
