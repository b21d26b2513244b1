"""The HTTP client of huggingface_hub.

Private: `utils._http._GLOBAL_CLIENT_FACTORY` and `default_client_factory` (seen in huggingface_hub 2.4), to keep a
factory that the user may have set while giving its clients a timeout. Without them a client of the same class is made
as the library uses.
"""

from collections.abc import Callable
from typing import Any


def client_factory() -> Callable[[], Any]:
    """What makes the clients of huggingface_hub as things are: its own factory, or the user's."""
    from huggingface_hub.utils import _http

    factory = getattr(_http, "_GLOBAL_CLIENT_FACTORY", None) or getattr(_http, "default_client_factory", None)
    if factory is None:
        from huggingface_hub import get_session

        return type(get_session())
    return factory
