"""`echo-trainer quickstart`: the embedded base, its data and the run that compares LoRA with Echo-LoRA on them."""

from .run import main

__all__ = ["main"]
