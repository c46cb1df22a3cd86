"""Hosts on this machine, each as a container: a network, processes, /tmp/ray and /dev/shm of its own, and a bridge.

The bridge is in namespaces, too: this machine's own network is left alone, and nothing has to be tidied up.
"""

from __future__ import annotations

from collections.abc import Sequence

from tests.namespaces import Namespaces

NOWHERE = "aaa0"
"""A network interface of every host that comes first and leads nowhere; the host's name stands for its address."""

_HOST = f"""
hostname {{name}}
mkdir -p /tmp/ray
mount -t tmpfs tmpfs /tmp/ray
mount -t tmpfs tmpfs /dev/shm
ip link set lo up
ip link add {NOWHERE} type veth peer name aaa1
ip address add 10.66.0.{{number}}/24 dev {NOWHERE}
ip link set {NOWHERE} up
printf '127.0.0.1 localhost\\n10.66.0.{{number}} {{name}}\\n' > /dev/shm/hosts
mount --bind /dev/shm/hosts /etc/hosts
"""


class Hosts:
    """Some hosts, until :meth:`close` or the end of this process.

    Args:
        names: Their names.

    Attributes:
        addresses: Where each can be reached by the others.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._bridge = Namespaces("ip link add bridge type bridge\nip link set bridge up")
        self._hosts: dict[str, Namespaces] = {}
        self.addresses = {name: f"10.77.0.{number}" for number, name in enumerate(names, start=1)}
        try:
            for number, name in enumerate(names, start=1):
                self._hosts[name] = Namespaces(_HOST.format(name=name, number=number))
                self._join(name)
        except BaseException:
            self.close()
            raise

    def __getitem__(self, name: str) -> Namespaces:
        return self._hosts[name]

    def _join(self, name: str) -> None:
        host = self._hosts[name]
        self._bridge.network(
            f"ip link add {name} type veth peer name net0 netns {host.pid}\nip link set {name} master bridge up"
        )
        host.network(f"ip address add {self.addresses[name]}/24 dev net0\nip link set net0 up")

    def cut(self, name: str) -> None:
        """Take a host's cable out."""
        self._bridge.network(f"ip link set {name} down")

    def mend(self, name: str) -> None:
        """Put it in again."""
        self._bridge.network(f"ip link set {name} up")

    def close(self) -> None:
        """End them, with all that runs on them."""
        for host in (*self._hosts.values(), self._bridge):
            host.close()
