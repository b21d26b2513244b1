"""Fixtures that several test files share. What they set up alike lies in `support/`."""

import pytest
import torch
from shapes import check_calls

check_calls()

# Two workers on two cores (README): each test has one core, here and in the processes that it starts.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """By family, folders of the tiny bases that adapters are saved for; nobody changes them."""
    import adapter_cases as make

    folder = tmp_path_factory.mktemp("bases")
    return {family: make.save_base(family, folder / family) for family in (*make.CONFIGS, *make.VARIED)}


@pytest.fixture(scope="module")
def hub():
    """A small Hub that answers over HTTP."""
    from hub_server import Hub

    with Hub() as running:
        yield running


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    """A process with the real Hub client, pointed at `hub`."""
    from push_client import Client

    running = Client(hub.url, tmp_path_factory.mktemp("hf"))
    yield running
    running.close()
