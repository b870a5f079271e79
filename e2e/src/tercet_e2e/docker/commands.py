"""The command line for our own Docker Engine: start, stop, env, and `hold`, which runs it.

eval "$(python -m tercet_e2e docker env)"      # docker, kind and others talk to it
"""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import typer

from tercet_e2e.cleanup import clean
from tercet_e2e.docker import engine as engines
from tercet_e2e.errors import ProcessError

START_TIMEOUT_S = 900.0  # the first time, packages are fetched
STOP_TIMEOUT_S = 180.0
PAUSE_S = 0.1
READY = "the engine runs until"

app = typer.Typer(no_args_is_help=True, help="A Docker Engine below the cache, which ends again.")


@app.command()
def start() -> None:
    """Have an engine: the one that answers, else our own, held by a process in the background."""
    found = engines.running()
    if found is None:
        _detach()
        found = engines.running()
    if found is None:
        raise ProcessError(f"no engine answers; see {engines.folder().logs}")
    print(f"a Docker Engine answers at {found.host}")


def _detach() -> None:
    state = engines.folder()
    state.logs.mkdir(parents=True, exist_ok=True, mode=0o700)
    log = state.logs / "hold.log"
    with log.open("wb") as output:
        holder = subprocess.Popen(
            [sys.executable, "-m", "tercet_e2e", "docker", "hold"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            cwd="/",
        )
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while READY not in log.read_text():
        if holder.poll() is not None or time.monotonic() > deadline_s:
            raise ProcessError(f"the engine did not start:\n{log.read_text()}")
        time.sleep(PAUSE_S)


@app.command()
def hold() -> None:
    """Run our own engine until Ctrl-C or SIGTERM."""
    asyncio.run(_hold())


async def _hold() -> None:
    stop = asyncio.Event()
    me = asyncio.current_task()
    assert me is not None
    started = False

    def end() -> None:
        # While it starts, this breaks the start off; afterwards it ends the wait.
        if not stop.is_set():
            stop.set()
            if not started:
                me.cancel()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, end)
    try:
        async with engines.engine(lambda text: print(text, flush=True)) as found:
            started = True
            if not found.ours:
                print(f"nothing to hold: {found.host} answers already", flush=True)
            print(f"{READY} Ctrl-C, SIGTERM or `docker stop`", flush=True)
            if found.ours:
                await stop.wait()
    except asyncio.CancelledError:
        if not stop.is_set():
            raise
    print("ended", flush=True)


@app.command()
def stop() -> None:
    """End our own engine with all its containers, also what a crash has left of it."""
    state = engines.folder()
    holder = state.holder()
    if holder is not None:
        os.kill(holder, signal.SIGTERM)
        deadline_s = time.monotonic() + STOP_TIMEOUT_S
        while state.holder() is not None:
            if time.monotonic() > deadline_s:
                raise ProcessError(f"process {holder} did not end in {STOP_TIMEOUT_S:.0f} s")
            time.sleep(PAUSE_S)
    clean(state)
    print("no engine of ours runs")


@app.command()
def env() -> None:
    """Print what makes a shell talk to the engine that answers."""
    found = engines.running()
    if found is None:
        raise ProcessError("no Docker Engine answers: `python -m tercet_e2e docker start` first")
    programs = str(Path(found.docker).parent)
    path = os.environ.get("PATH", "")
    if programs not in path.split(":"):
        print(f"export PATH={shlex.quote(f'{programs}:{path}')}")
    print(f"export DOCKER_HOST={shlex.quote(found.host)}")
