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


def run(out: Path, kills: int, processes: int, arguments: list[str]) -> dict:
    known: dict[str, dict] = {}
    counts = []
    begin = time.monotonic()
    warm = [*arguments[:-2], "--out", str(out.with_name("warm"))]
    assert wait(start(warm, 1)) == [0]
    seconds = time.monotonic() - begin
    for _ in range(kills):
        children = start(arguments, processes)
        time.sleep(seconds * random.random() ** 2)  # most before the first folder is there
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
