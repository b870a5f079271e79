"""The floor: fio on a prewritten file, and the round trip of two blocking processes."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import socket
import statistics
import subprocess
import time
from pathlib import Path

from tercet_e2e.bench.cases import Case
from tercet_e2e.errors import E2eError

FILE_BYTES = 1 << 30
FIO_TIMEOUT_S = 120
ROUND_TRIPS = 4000
ROUND_TRIP_BYTES = 4096


class BenchError(E2eError):
    """A measurement could not be made; says which tool said what."""


def fio(file: Path, case: Case, seconds: int) -> float:
    """One run of fio; the figure that the case measures. Raises BenchError."""
    rw = ("rand" if case.random else "") + case.access
    answer = _run_fio(
        f"--filename={file}",
        f"--rw={rw}",
        f"--bs={case.block_bytes}",
        f"--iodepth={case.depth}",
        f"--runtime={seconds}",
        "--time_based",
        *(["--sync=dsync"] if case.access == "write" else []),
    )
    figures = answer["jobs"][0][case.access]
    if case.measure == "p50_us":
        return float(figures["clat_ns"]["percentile"]["50.000000"]) / 1000
    if case.measure == "iops":
        return float(figures["iops"])
    return float(figures["bw_bytes"]) / (1 << 20)


def prewrite(file: Path) -> None:
    """Write the whole file, so that no run allocates."""
    _run_fio(f"--filename={file}", "--rw=write", "--bs=1M", "--iodepth=8", f"--size={FILE_BYTES}")


def _run_fio(*arguments: str) -> dict:  # type: ignore[type-arg]
    if shutil.which("fio") is None:
        raise BenchError("fio is not installed: apt-get install fio")
    command = [
        "fio",
        "--name=floor",
        "--ioengine=io_uring",
        "--direct=1",
        f"--size={FILE_BYTES}",
        "--output-format=json",
        *arguments,
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=FIO_TIMEOUT_S, check=False
    )
    if done.returncode != 0:
        raise BenchError(f"{' '.join(command)}: {done.stderr.strip()[-500:]}")
    found = json.loads(done.stdout[done.stdout.index("{") :])
    assert isinstance(found, dict)
    return found


def round_trip_us() -> float:
    """Median round trip of 4 KiB between two blocking processes over loopback TCP, in us."""
    listener = socket.create_server(("127.0.0.1", 0))
    echo = multiprocessing.get_context("fork").Process(target=_echo, args=(listener,))
    echo.start()
    times_ns = []
    with socket.create_connection(listener.getsockname()) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        payload = bytes(ROUND_TRIP_BYTES)
        for _ in range(ROUND_TRIPS):
            started_ns = time.perf_counter_ns()
            connection.sendall(payload)
            _receive(connection, ROUND_TRIP_BYTES)
            times_ns.append(time.perf_counter_ns() - started_ns)
    echo.join()
    listener.close()
    return statistics.median(times_ns) / 1000


def _echo(listener: socket.socket) -> None:
    connection, _ = listener.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while data := _receive(connection, ROUND_TRIP_BYTES):
        connection.sendall(data)


def _receive(connection: socket.socket, count: int) -> bytes:
    got = bytearray()
    while len(got) < count:
        piece = connection.recv(count - len(got))
        if not piece:
            return b""
        got += piece
    return bytes(got)
