"""Two network namespaces joined by one cable, whose rate can be set: a slow network on one machine.

    with Link() as link:
        link.limit(500)                     # Mbit/s, each way
        link.start(0, [sys.executable, …])  # a process inside the first namespace

Everything is made with `ip` and `tc` (a token bucket, `tbf`, at both ends) and removed at the end,
with every process that was started, whether it ends well, by an error or by Ctrl-C. The namespaces
use TCP's oldest congestion control, reno, which every kernel has: the newer ones estimate a rate
and pace themselves by it, and the short messages of a step keep them estimating.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from core.errors import UserError

TOOLS = ("ip", "tc", "taskset")
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
INTERFACE = "cable"
CONGESTION = "/proc/sys/net/ipv4/tcp_congestion_control"
MTU = 9000
BURST = 0.25e-3
"""Seconds of the rate that may leave at once after a pause. Little, for standard residual pauses
before every message, ladder does not; but more than the timers' precision, and than one packet."""


class Link:
    """The namespaces 0 and 1; processes in one reach the other at `address(end)`."""

    def __init__(self) -> None:
        self.names = [f"manyforms-{os.getpid()}-{end}" for end in range(2)]
        self.processes: list[subprocess.Popen[str]] = []
        self.cores: list[int] = []

    def __enter__(self) -> Link:
        """Make both ends.

        Raises:
            UserError: without root, the tools, or two cores.
        """
        missing = [tool for tool in TOOLS if shutil.which(tool) is None]
        if missing:
            raise UserError(
                f"{', '.join(missing)}: not installed; network namespaces need iproute2 "
                "and util-linux"
            )
        if os.geteuid() != 0:
            raise UserError("network namespaces and rate limits need root; run this as root")
        self.cores = sorted(os.sched_getaffinity(0))[:2]
        if len(self.cores) < 2:
            raise UserError("one core per rank is needed, and this process may use only one")
        try:
            for name in self.names:
                _run("ip", "netns", "add", name)
            ends = ["name", INTERFACE, "netns", self.names[0]]
            peer = ["name", INTERFACE, "netns", self.names[1]]
            _run("ip", "link", "add", *ends, "type", "veth", "peer", *peer)
            for end in range(2):
                self._inside(end, "ip", "address", "add", f"{address(end)}/24", "dev", INTERFACE)
                self._inside(end, "ip", "link", "set", INTERFACE, "mtu", f"{MTU}", "up")
                self._inside(end, "ip", "link", "set", "lo", "up")
                self._inside(end, "sh", "-c", f"echo reno > {CONGESTION}")
        except BaseException:
            self.close()
            raise
        return self

    def limit(self, mbit: int) -> None:
        """Set the rate of both directions, in Mbit/s."""
        burst = max(MTU + 1000, round(BURST * mbit * 1e6 / 8))
        for end in range(2):
            self._inside(
                end, "tc", "qdisc", "replace", "dev", INTERFACE, "root", "tbf",
                "rate", f"{mbit}mbit", "burst", f"{burst}", "latency", "50ms",
            )  # fmt: skip

    def start(self, end: int, command: list[str], environment: Mapping[str, str]) -> Any:
        """A process in a namespace, on one core of its own, with pipes for input and output."""
        within = ["ip", "netns", "exec", self.names[end], "taskset", "-c", str(self.cores[end])]
        process = subprocess.Popen(
            within + command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
            start_new_session=True,  # Ctrl-C is for the parent, which ends them
        )
        self.processes.append(process)
        return process

    def _inside(self, end: int, *command: str) -> None:
        _run("ip", "netns", "exec", self.names[end], *command)

    def close(self) -> None:
        """End the processes and remove the namespaces, and with them the cable."""
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # a second Ctrl-C comes after this
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def address(end: int) -> str:
    return f"10.77.0.{end + 1}"


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{' '.join(command)}: {done.stderr.strip() or 'failed'}")
