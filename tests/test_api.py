"""The public names at the root of the package: there without torch until they are used, and they do what they say."""

import inspect
import subprocess
import sys

import pytest
from adapter_cases import make_adapter  # noqa: F401
