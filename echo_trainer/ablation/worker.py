"""A process that carries out runs: one JSON line per run on its input, events as JSON lines on its output.

It ends when its input ends, at once, whatever it is doing: whoever scheduled the runs is gone then.
"""

import json
import os
import queue
import sys
import threading
import traceback
from pathlib import Path
from typing import Any


def main() -> None:
    """Read runs until the input ends."""
    # Libraries print; events get a stream of their own and everything else goes to the log.
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def send(**event: Any) -> None:
        events.write(json.dumps(event) + "\n")
        events.flush()

    jobs: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=_listen, args=(jobs,), daemon=True).start()
    output, recipe = Path(sys.argv[1]), json.loads(sys.argv[2])

    from ..quiet import quiet_libraries
    from .plan import Run
    from .recipe import AblationRecipe
    from .run_one import Workbench, run_one

    bench = None
    with quiet_libraries():
        send(event="ready")
        while True:
            job = jobs.get()
            run = Run(**job["run"])

            def report(what: str, done: int, total: int, run: Run = run) -> None:
                send(event="progress", run=run.id, what=what, done=done, total=total)

            try:
                bench = bench or Workbench(AblationRecipe(**recipe))
                run_one(bench, run, job["spec"], output, report)
                send(event="finished", run=run.id)
            except Exception:
                send(event="failed", run=run.id, error=traceback.format_exc())


def _listen(jobs: queue.Queue) -> None:
    for line in sys.stdin:
        jobs.put(json.loads(line))
    os._exit(0)


if __name__ == "__main__":
    main()
