"""Runs of `gafext generate` that are killed at random moments and started again, without a new interpreter for each.

    python killing.py OUT KILLS PROCESSES SEED ARGUMENT...

Prints one line of JSON: the folders that were there after each kill, and the exit codes of the last run. Fails if a
folder is half written or was made twice.
"""

import json
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

from gafext.cli import main

_PATIENCE = 400.0  # seconds


def start(arguments: list[str], processes: int) -> list[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    started = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            if processes > 1:
                names = {"RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                os.environ.update({name: str(value) for name, value in names.items()})
            code = 70
            try:
                code = main(arguments)
            finally:
                os._exit(code)
        started.append(child)
    return started


def wait(children: list[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def look(out: Path, known: dict[str, dict]) -> None:
    """Compare the folders with those seen before: files and times of change."""
    for folder in sorted(out.iterdir()) if out.exists() else ():
        if folder.name.startswith("."):
            continue
        state = {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))}
        assert known.setdefault(folder.name, state) == state, f"{folder} was made twice"
        assert {"run.json", "view_000.png", "index.html"} <= state.keys(), f"{folder} is half written"


def count(out: Path) -> int:
    return sum(not path.name.startswith(".") for path in out.iterdir()) if out.exists() else 0


def run(out: Path, kills: int, processes: int, arguments: list[str]) -> dict:
    known: dict[str, dict] = {}
    counts, begin, warm = [], time.monotonic(), out.with_name("warm")
    assert wait(start([*arguments[:-2], "--out", str(warm)], 1)) == [0]
    seconds, total = time.monotonic() - begin, count(warm)
    for _ in range(kills):
        children = start(arguments, processes)
        # Half of them while they start or make the first folder, half after it: however busy the machine is.
        more = random.randint(0, 1)
        while count(out) < min(len(known) + more, total) and time.monotonic() < begin + _PATIENCE:
            time.sleep(0.005)
        time.sleep(random.uniform(0, seconds / (20 if more else 2)))
        for child in children:
            os.kill(child, signal.SIGKILL)
        wait(children)
        look(out, known)
        counts.append(len(known))
    codes = wait(start(arguments, processes))
    look(out, known)
    return {"counts": counts, "codes": codes}


if __name__ == "__main__":
    out, kills, processes, seed, *arguments = sys.argv[1:]
    random.seed(int(seed))
    print(json.dumps(run(Path(out), int(kills), int(processes), [*arguments, "--out", out])))
