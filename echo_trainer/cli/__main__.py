"""`python -m echo_trainer.cli`, for launchers that take a module."""

import sys

from . import main

sys.exit(main())
