"""Bars of long work on a terminal, and plain lines where the output is a file, in which bars are not seen."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class Lines(Progress):
    """
    A bar for each task, with what it is about, how much of it is done and the time it took.

    Args:
        console: where they are drawn.
        width: of the words before a bar, in characters.
    """

    def __init__(self, console: Console, width: int = 28):
        description = TextColumn(f"{{task.description:{width}}}")
        super().__init__(description, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console)

    def say(self, line: str) -> None:
        """Print a line, where the bars are not seen."""
        if not self.console.is_terminal:
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)
