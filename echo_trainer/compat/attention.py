"""Which attention kernel a model runs on.

Private: `config._attn_implementation` (seen in transformers 5.23 and 5.24), for which there is no public question.
"""

from typing import Any


def is_varlen(config: Any) -> bool:
    """Whether the kernel takes rows of several documents apart, so that only pairs inside a document are computed."""
    return "flash" in str(config._attn_implementation)
