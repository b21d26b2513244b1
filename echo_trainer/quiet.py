"""Keep the libraries' notes out of a demonstration or a measurement; errors still show."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hide warnings, notes and progress bars of datasets, transformers and echo_trainer inside the context."""
    import datasets
    import transformers

    ours = logging.getLogger("echo_trainer")
    verbosity, level = transformers.logging.get_verbosity(), ours.level
    bars = transformers.logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        datasets.disable_progress_bars()
        ours.setLevel(logging.ERROR)
        try:
            yield
        finally:
            transformers.logging.set_verbosity(verbosity)
            ours.setLevel(level)
            if bars[0]:
                transformers.logging.enable_progress_bar()
            if not bars[1]:
                datasets.enable_progress_bars()
