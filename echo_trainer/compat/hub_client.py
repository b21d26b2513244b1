"""The HTTP client of huggingface_hub.

It is one for the whole process, and only some of the library's calls take a timeout of their own. So the timeout is
given to the shared client, in the main thread and before training begins: a push beside the training changes nothing.

Private: `utils._http._GLOBAL_CLIENT_FACTORY` and `default_client_factory` (seen in huggingface_hub 2.4), to keep a
factory that the user may have set while giving its clients a timeout. Without them a client of the same class is made
as the library uses.
"""

from collections.abc import Callable
from typing import Any

_seconds: float | None = None  # what the factory below gives to new clients


def client_factory() -> Callable[[], Any]:
    """What makes the clients of huggingface_hub as things are: its own factory, or the user's."""
    from huggingface_hub.utils import _http

    factory = getattr(_http, "_GLOBAL_CLIENT_FACTORY", None) or getattr(_http, "default_client_factory", None)
    if factory is None:
        from huggingface_hub import get_session

        return type(get_session())
    return factory


def use_timeout(seconds: float) -> None:
    """
    Give huggingface_hub's shared HTTP client, which waits for ever, a timeout. Stays in force in this process.

    Not for threads in the background: it changes what others use.
    """
    global _seconds
    from huggingface_hub import get_session, set_client_factory

    first, _seconds = _seconds is None, seconds
    if first:
        # The factory as well: the library makes a new client after a refused connection.
        make = client_factory()  # perhaps the user's own

        def make_with_timeout() -> Any:
            client = make()
            client.timeout = _seconds
            return client

        set_client_factory(make_with_timeout)
    get_session().timeout = seconds
