"""
Code blocks of the documentation, taken out and run.

A page's blocks run one after the other in one folder and, for Python, one namespace. Files with the names of public
models and data sets lie in that folder, so that a block runs as it is printed: the embedded base in place of every
model, a few rows in place of every data set. A block that cannot run says why in a comment above it:

    <!-- not run: needs vLLM -->

A block with a title is a file; it is written before the next block runs.
"""

import json
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import yaml
from paths import BASE, ROOT

from echo_trainer import cli
from echo_trainer.ablation.recipe import load_recipe
from echo_trainer.quickstart.run import TRAIN
from echo_trainer.recipe.arguments import CLASSES
from echo_trainer.recipe.check import check_options

PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]+?) -->\n)?^```(?P<language>\w*)(?: title=\"(?P<title>[^\"]+)\")?\n"
    r"(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
ROWS = "trl-lib/tldr"
N_ROWS = 12
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the file that it is, its text, its line, and why it is not run (None: it is)."""

    language: str
    title: str | None
    code: str
    line: int
    reason: str | None


def blocks_of(page: str) -> list[Block]:
    """The blocks of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        Block(m["language"], m["title"], m["code"], text.count("\n", 0, m.start("code")), m["reason"])
        for m in BLOCK.finditer(text)
    ]


def furnish(folder: Path) -> None:
    """Put stand-ins for public models and data sets into a folder."""
    model = folder / MODEL
    shutil.copytree(BASE, model)
    (model / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    (folder / ROWS).mkdir(parents=True)
    rows = TRAIN.read_text(encoding="utf-8").splitlines(keepends=True)[:N_ROWS]
    (folder / ROWS / "train.jsonl").write_text("".join(rows), encoding="utf-8")


class Page:
    """What the blocks of a page share."""

    def __init__(self, name: str):
        self.name, self.names = name, {"__name__": "__main__"}

    def run(self, block: Block) -> None:
        """Run a block in the current folder; an error names its line."""
        if block.title is not None:
            Path(block.title).write_text(block.code, encoding="utf-8")
        try:
            getattr(self, f"_{block.language}", self._nothing)(block)
        except BaseException as error:
            error.add_note(f"in the {block.language} block at {self.name}:{block.line}")
            raise

    def _python(self, block: Block) -> None:
        lines = "\n" * block.line + block.code  # so that a traceback shows the line of the page
        exec(compile(lines, self.name, "exec"), self.names)

    def _bash(self, block: Block) -> None:
        for command in block.code.replace("\\\n", " ").splitlines():
            words = shlex.split(command, comments=True)
            if words:
                assert words[0] == "echo-trainer", f"{command!r} cannot be run here: say why in a comment above it"
                assert cli.main(words[1:]) == 0, command

    def _yaml(self, block: Block) -> None:
        recipe = yaml.safe_load(block.code)
        if recipe.pop("ablation", None):
            load_recipe(Path(str(block.title)))
        check_options(block.title or self.name, recipe, CLASSES)

    def _json(self, block: Block) -> None:
        for line in block.code.splitlines():
            json.loads(line)

    def _nothing(self, block: Block) -> None:
        assert block.language in ("csv", "text"), f"a block at {self.name}:{block.line} says no language that is known"
