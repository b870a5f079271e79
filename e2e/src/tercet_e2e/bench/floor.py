"""The floor: fio on a prewritten file, and the round trip of two blocking processes."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import socket
import statistics
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from tercet_e2e.bench.cases import Case
from tercet_e2e.errors import E2eError

FILE_BYTES = 1 << 30
FIO_TIMEOUT_S = 120
ROUND_TRIPS = 4000
ROUND_TRIP_BYTES = 4096


class BenchError(E2eError):
    """A measurement could not be made; says which tool said what."""


@dataclass(frozen=True)
class Floor:
    """What one run of fio found."""

    value: float
    """The figure that the case measures."""
    cpu_us: float
    """CPU of fio's process for each operation."""


def fio(file: Path, case: Case, seconds: float, file_bytes: int = FILE_BYTES) -> Floor:
    """One run of fio. Raises BenchError."""
    rw = ("rand" if case.random else "") + case.access
    answer = _run_fio(
        f"--filename={file}",
        f"--size={file_bytes}",
        f"--rw={rw}",
        f"--bs={case.block_bytes}",
        f"--iodepth={case.depth}",
        f"--runtime={round(seconds * 1000)}ms",
        "--time_based",
        *(["--sync=dsync"] if case.access == "write" else []),
    )
    job = answer["jobs"][0]
    figures = job[case.access]
    busy = (float(job["usr_cpu"]) + float(job["sys_cpu"])) / 100
    cpu_us = busy * float(job["job_runtime"]) * 1000 / float(figures["total_ios"])
    if case.measure == "p50_us":
        value = float(figures["clat_ns"]["percentile"]["50.000000"]) / 1000
    elif case.measure == "iops":
        value = float(figures["iops"])
    else:
        value = float(figures["bw_bytes"]) / (1 << 20)
    return Floor(value, cpu_us)


def prewrite(file: Path, file_bytes: int = FILE_BYTES) -> None:
    """Write the whole file, so that no run allocates."""
    _run_fio(f"--filename={file}", f"--size={file_bytes}", "--rw=write", "--bs=1M", "--iodepth=8")


def _run_fio(*arguments: str) -> dict:  # type: ignore[type-arg]
    if shutil.which("fio") is None:
        raise BenchError("fio is not installed: apt-get install fio")
    command = [
        "fio",
        "--name=floor",
        "--ioengine=io_uring",
        "--direct=1",
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
