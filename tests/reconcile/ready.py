"""A machine of real files with a pretended systemd, with a package and a bundle lying ready."""

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from factories import CLUSTER, MOMENT, a_bundle, a_config
from fakes import FakeMachine, Onlooker, write_package
from lab.cluster import write_directory
from vmmesh_agent.clock import Clock
from vmmesh_agent.config import Config, SidecarSettings
from vmmesh_agent.reconcile import Joined, reconcile
from vmmesh_agent.units import Units
from vmmesh_agent.watch import Watch
from vmmesh_agent.world import World

PACKAGE = SidecarSettings(package="/opt/istio-sidecar.deb")


class Machine(FakeMachine):
    """A machine with a package and a bundle lying ready."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        write_package(root / "opt/istio-sidecar.deb")
        self.token = CLUSTER.token()
        self.deliver()
        self.onlooker = Onlooker()

    def deliver(
        self,
        token: str | None = None,
        environment: Mapping[str, str | None] | None = None,
        root_cert: bytes = CLUSTER.root_pem,
    ) -> None:
        files = dict(a_bundle(token=token or self.token, environment=environment).files) | {"root-cert.pem": root_cert}
        write_directory(files, self.root / "srv/bundle")

    def world(self, config: Config | None = None, moment: datetime = MOMENT) -> World:
        clock = Clock(now=lambda: moment)
        return World(self, config or a_config(sidecar=PACKAGE), self.onlooker, clock=clock, patience=100)

    def watch(self) -> Watch:
        return Watch(self, Units(self))

    def join(self, config: Config | None = None, *, again: bool = False) -> Joined:
        return reconcile(self.world(config), self.watch(), again=again)

    def everything(self) -> dict[str, tuple[int, int, int, bytes | None]]:
        """Return all that is on the disk, with inode and owner: a file that was written anew is another one."""
        found = {}
        for path in sorted(self.root.rglob("*")):
            status = path.lstat()
            content = path.read_bytes() if path.is_file() and not path.is_symlink() else None
            found[str(path.relative_to(self.root))] = (status.st_ino, status.st_mode, status.st_uid, content)
        return found
