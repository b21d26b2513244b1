"""Write `recipes/what-went-wrong/README.md` from the table of wrong inputs: the messages as they are, by group.

python tests/support/make_help.py
"""

import os
import re
import tempfile
from pathlib import Path

import bad_inputs
import bad_inputs_on_disk
from paths import ROOT

PAGE = ROOT / "recipes" / "what-went-wrong" / "README.md"
HEAD = """# What went wrong?

What echo_trainer says to inputs that cannot work, and what each message asks for. The page is generated from the tests
(`python tests/support/make_help.py`), so these are the words you see. In every case nothing on disk is changed.
`ECHO_TRAINER_TRACEBACK=1` shows where an error of a command comes from.

Not errors of input, but worth knowing:

- **A run was killed.** Start it again with `resume_from_checkpoint=True` (`--resume_from_checkpoint true`): it goes on
  from the last whole checkpoint and ends in the same bits. Damaged checkpoints are passed over with a warning.
- **The disk is full.** The checkpoint that was being written is removed, the last whole one stays. Free some space,
  set `save_total_limit=2`, resume. At the final save the adapter saved before stays as it was.
- **Out of memory.** A note below the error says which part of the step was running, how many tokens and samples it
  had, and which options make it smaller.
- **"The echo pass gave a loss or gradients that are not finite".** That micro-batch used the plain loss; the adapter
  is intact (`echo/nonfinite` counts them). Ten in a row end the run: lower `echo_learning_rate`.
- **"The plain loss or its gradients are not finite".** No weight was changed by that step. Resume with a lower
  `learning_rate`.
"""


def messages() -> dict[str, list[tuple[str, str]]]:
    """By group: what was given, and the message."""
    found: dict[str, list[tuple[str, str]]] = {}
    start = Path.cwd()
    for case in [*bad_inputs.CASES, *bad_inputs_on_disk.CASES]:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            try:
                case.give(Path(folder))
            except case.error as error:
                found.setdefault(case.group, []).append((case.given, tidy(str(error), folder)))
            else:
                raise AssertionError(f"{case.given} was accepted")
            finally:
                os.chdir(start)
    return found


def tidy(message: str, folder: str) -> str:
    """A message without the paths of the machine it was made on."""
    message = message.replace(f"{Path(folder).resolve()}/", "").replace(f"{folder}/", "")
    message = re.sub(r"\x1b\[[0-9;]*m", "", message)
    message = re.sub(r"has \d+ bytes and had \d+", "has 1023 bytes and had 1024", message)
    lines = [line for line in message.splitlines() if not set(line.strip()[:1]) & set("┏┃┡│└[")]  # tables, usage
    message = " ".join(" ".join(lines).replace("|", "\\|").split())
    message = re.sub(r"(is no command\.).*", r"\1", message)
    message = re.sub(r"\d\.\de[+-]\d\d", "...", message)  # a measured difference
    return re.sub(r"(It has: )\w+/.*", r"\1...", message)


def render() -> str:
    """The page."""
    parts = [HEAD]
    for group, rows in messages().items():
        parts.append(f"\n## {group}\n\n| given | message |\n|---|---|\n")
        parts += [f"| {given} | {message} |\n" for given, message in rows]
    return "".join(parts)


if __name__ == "__main__":
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(render(), encoding="utf-8")
