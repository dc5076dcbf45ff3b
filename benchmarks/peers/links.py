"""Links between the workers: network namespaces on one bridge, each with a shaped virtual cable.

    namespace of worker r:  e0 10.77.0.(r+1) --veth-- port r  |
                                                       bridge |  namespace of the switch
    tc tbf on e0 bounds what the worker sends, on its port what it receives: a full-duplex network card.

``loopback`` is a namespace of its own too, so that its counters hold this benchmark's bytes and nothing else. All of it
lives in namespaces that vanish with the processes that hold them; nothing outside is touched. Needs root or user
namespaces, iproute2 and util-linux; without them only a loopback without counters is left.
"""

from __future__ import annotations

import os
import subprocess
from types import TracebackType

RATES = {"loopback": 0.0, "10gbit": 10_000.0, "1gbit": 1_000.0, "100mbit": 100.0, "10mbit": 10.0}
"""Mbit/s of the links; loopback is as fast as the processors."""


class LinkError(Exception):
    """The machine does not let us make this link."""


class Links:
    """The network of one group of workers.

    Args:
        link: a name in RATES.
        workers: how many.
    """

    def __init__(self, link: str, workers: int) -> None:
        self._link, self._holders = link, []
        self.shaped = link != "loopback"
        try:
            self._switch = self._hold([] if os.geteuid() == 0 else ["--user", "--map-root-user"], [])
            self._ip(self._switch, "link set lo up")
            self._workers = [self._cable(rank) for rank in range(workers)] if self.shaped else []
            self.private = True
        except (OSError, subprocess.SubprocessError) as error:
            self.close()
            if self.shaped:
                raise LinkError(f"{link}: no network namespaces here ({_reason(error)})") from None
            self.private = False

    def __enter__(self) -> Links:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def address(self) -> str:
        """Where worker 0 is found."""
        return "10.77.0.1" if self.shaped else "127.0.0.1"

    @property
    def environment(self) -> dict[str, str]:
        """Tells gloo and TensorPipe their interface, and the worker whose bytes to count."""
        if not self.private:
            return {"DES_PEERS_INTERFACE": ""}
        name = "e0" if self.shaped else "lo"
        return dict.fromkeys(("GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME", "DES_PEERS_INTERFACE"), name)

    def prefix(self, rank: int) -> list[str]:
        """What stands before a worker's command."""
        if not self.private:
            return []
        return self._inside(self._workers[rank] if self.shaped else self._switch)

    def close(self) -> None:
        """Let go of all namespaces."""
        for holder in self._holders:
            holder.communicate()
        self._holders = []

    def _hold(self, flags: list[str], prefix: list[str]) -> int:
        """A process that holds a new network namespace open until its stdin closes."""
        holder = subprocess.Popen(
            [*prefix, "unshare", *flags, "--net", "sh", "-c", "echo; cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._holders.append(holder)
        assert holder.stdout is not None and holder.stderr is not None
        if not holder.stdout.readline():
            raise OSError(holder.stderr.read().decode().strip())
        return holder.pid

    def _inside(self, holder: int) -> list[str]:
        user = [] if os.geteuid() == 0 else ["--user", "--preserve-credentials"]
        return ["nsenter", "--target", str(holder), *user, "--net", "--"]

    def _ip(self, holder: int, *commands: str) -> None:
        for command in commands:
            tool = [] if command.startswith("tc ") else ["ip"]
            subprocess.run([*self._inside(holder), *tool, *command.split()], check=True, capture_output=True)

    def _cable(self, rank: int) -> int:
        """The holder of a worker's namespace, which a shaped cable joins to the switch."""
        if rank == 0:
            self._ip(self._switch, "link add bridge type bridge", "link set bridge up")
        holder = self._hold([], self._inside(self._switch))
        # A burst of 2 ms, and room for what a receiver's TCP window may bring at once.
        rate = RATES[self._link]
        shape = f"root tbf rate {rate:g}mbit burst {max(int(rate * 1000 / 8 * 2), 65_536)} limit {8 << 20}"
        self._ip(
            self._switch,
            f"link add port{rank} type veth peer name e0 netns {holder}",
            f"link set port{rank} master bridge up",
            f"tc qdisc add dev port{rank} {shape}",
        )
        self._ip(
            holder,
            "link set lo up",
            f"addr add 10.77.0.{rank + 1}/24 dev e0",
            "link set e0 up",
            f"tc qdisc add dev e0 {shape}",
        )
        return holder


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        return str(error.stderr.decode().strip())
    return str(error)
