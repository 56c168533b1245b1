"""The snippets of README.md in Python and JavaScript."""

import re
from pathlib import Path


README = Path(__file__).parents[2] / "README.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
JAVASCRIPT = re.findall(r"```js\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
OF_THE_HUB = "me/photos"
OF_ONNX = "onnxruntime"


def snippet_with(words: str) -> str:
    [snippet] = [snippet for snippet in SNIPPETS if words in snippet]
    return snippet
