"""The trees that machines are booted from, as layers for an overlay file system.

From the bottom up: Debian itself, the agent's dependencies in their virtual environment, the agent. Each is
kept in the cache, so that a changed agent costs a second or two and an unchanged one nothing.
"""

import platform
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from lab import cache
from lab.run import LabError

Family = Literal["rpm", "deb"]

REPOSITORY = Path(__file__).resolve().parents[2]

SUITE = "bookworm"
_PACKAGES = (
    # a machine as clouds have it
    *(
        "systemd",
        "systemd-sysv",
        "dbus",
        "udev",
        "iproute2",
        "iptables",
        "sudo",
        "hostname",
        "procps",
        "less",
    ),
    *("ca-certificates", "openssl", "logrotate"),
    # what the agent needs, and both families of package managers
    *("python3", "python3-venv", "rpm", "dnf"),
    # for the tests: faults from outside, and joining by hand as a yardstick
    *("strace", "curl"),
)
# They work in the background at their own time, most of them over the network; in a machine that lives for
# seconds they would only make two snapshots differ.
MASKED_UNITS = (
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dnf-makecache.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "fstrim.timer",
    "logrotate.timer",
)
_AGENT = "/usr/lib/vmmesh-agent"
_MOUNT = "/mnt"  # where a chroot finds what it shall install; each Debian has this folder
_HOST_PYTHON = "/usr/bin/python3"  # Debian's own: its wheels fit the Python of the tree


# The programs of a family of package managers: a machine has one family, so the other's are taken away.
_PROGRAMS: dict[Family, str] = {
    "deb": "/usr/bin/dpkg /usr/bin/dpkg-* /usr/bin/apt /usr/bin/apt-*",
    "rpm": "/usr/bin/rpm /usr/bin/rpm2* /usr/bin/rpmkeys /usr/bin/rpmdb /usr/bin/dnf /usr/bin/dnf-*",
}
_RPM_OS_RELEASE = """\
NAME="Test machine"
PRETTY_NAME="Test machine with rpm (built from Debian)"
ID=vmmesh-test
ID_LIKE="rhel fedora"
"""


def layers(family: Family, *, fixture_rpms: Sequence[Path] = (), with_agent: bool = True) -> list[Path]:
    """A machine of this family with the installed agent of this repository, the lowest layer first.

    `fixture_rpms` stand for the distribution's packages that an rpm may require: the rpm database of a
    Debian tree is empty. `with_agent=False` is for the agent's own package.
    """
    base = base_tree()
    if not with_agent:
        return [base, _family(base, family, fixture_rpms)]
    dependencies = _dependencies(base)
    agent = _agent([base, dependencies])
    return [base, _family(base, family, fixture_rpms), dependencies, agent]


def base_tree() -> Path:
    """A minimal Debian with systemd; takes about a minute when it is not in the cache.

    Its machine ID is empty and its package lists are too: machines have no way to a mirror.
    """
    definition = [SUITE, *_PACKAGES, *MASKED_UNITS, platform.machine()]

    return cache.entry("debian", definition, lambda tree: debootstrap(tree, _PACKAGES))


def debootstrap(tree: Path, packages: Sequence[str]) -> None:
    """Fill `tree` with a minimal Debian that has `packages`, without a machine ID and without package lists."""
    mirror = _mirror()
    _progress(f"building Debian {SUITE}")
    include = f"--include={','.join(packages)}"
    # In a mount namespace of its own: an interrupted debootstrap leaves /proc mounted in the tree.
    quietly(["unshare", "--mount", "debootstrap", "--variant=minbase", include, SUITE, str(tree), *mirror])
    quietly(["chroot", str(tree), "apt-get", "clean"])
    for lists in (tree / "var/lib/apt/lists").glob("*_*"):
        lists.unlink()
    quietly(["systemctl", f"--root={tree}", "mask", *MASKED_UNITS])
    (tree / "etc/machine-id").write_text("")
    (tree / "etc/resolv.conf").unlink(missing_ok=True)  # debootstrap's copy of the host's


def debian(base: Path, *packages: str) -> Path:
    """A layer over `base` with more packages of Debian, and all that they require; their services are enabled."""
    state = (base / "var/lib/dpkg/status").read_bytes()

    def fetch(out: Path) -> None:
        _progress(f"fetching {', '.join(packages)}")
        options = [f"Dir::State::status={base}/var/lib/dpkg/status", f"Dir::Cache::archives={out}"]
        argv = ["apt-get", *(f"--option={option}" for option in (*options, "APT::Sandbox::User=root"))]
        quietly([*argv, "install", "--yes", "--no-install-recommends", "--download-only", *packages])

    def build(layer: Path) -> None:
        install = "DEBIAN_FRONTEND=noninteractive dpkg --install /mnt/*.deb"
        in_chroot([base], layer, ["/bin/sh", "-ec", install], mount=debs)

    debs = cache.entry("debs", [base.name, state, *packages], fetch)
    return cache.entry("debian-more", [debs.name], build)


def _family(base: Path, family: Family, fixture_rpms: Sequence[Path]) -> Path:
    def build(layer: Path) -> None:
        if fixture_rpms:
            names = [f"{_MOUNT}/{path.name}" for path in fixture_rpms]
            in_chroot([base], layer, ["rpm", "--install", *names], mount=fixture_rpms[0].parent)
        others = " ".join(programs for name, programs in _PROGRAMS.items() if name != family)
        in_chroot([base], layer, ["/bin/sh", "-ec", f"rm -f {others}"])
        if family == "rpm":
            (layer / "etc").mkdir(exist_ok=True)
            (layer / "etc/os-release").write_text(_RPM_OS_RELEASE)

    inputs: list[str | bytes] = [base.name, family, _PROGRAMS["deb"], _PROGRAMS["rpm"], _RPM_OS_RELEASE]
    return cache.entry(family, [*inputs, *cache.contents(*fixture_rpms)], build)


def _dependencies(base: Path) -> Path:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    requirements: list[str] = project["dependencies"]
    inputs = [*requirements, _host_version()]
    wheels = cache.entry("wheels", inputs, lambda out: _build_wheels(requirements, out))

    def build(layer: Path) -> None:
        _progress("installing the agent's dependencies")
        install = [f"{_AGENT}/bin/pip", "install", "--quiet", "--no-index", f"--find-links={_MOUNT}"]
        in_chroot([base], layer, ["/usr/bin/python3", "-m", "venv", _AGENT])
        in_chroot([base], layer, [*install, *requirements], mount=wheels)

    return cache.entry("dependencies", [base.name, wheels.name], build)


def _agent(below: Sequence[Path]) -> Path:
    sources = (REPOSITORY / "pyproject.toml", REPOSITORY / "agent", REPOSITORY / "systemd")
    inputs: list[str | bytes] = [*(layer.name for layer in below), *cache.contents(*sources)]

    def build(layer: Path) -> None:
        wheel = layer.with_name(f"{layer.name}.wheel")
        try:
            _build_wheel(wheel)
            install = [f"{_AGENT}/bin/pip", "install", "--quiet", "--no-index", "--no-deps"]
            names = [f"{_MOUNT}/{path.name}" for path in wheel.glob("*.whl")]
            in_chroot(below, layer, [*install, *names], mount=wheel)
        finally:
            shutil.rmtree(wheel)
        (layer / "usr/bin").mkdir(parents=True, exist_ok=True)
        (layer / "usr/bin/vmmesh-agent").symlink_to(f"{_AGENT}/bin/vmmesh-agent")
        units = layer / "usr/lib/systemd/system"
        # Without sysusers.d, which is the agent's package's: here the sidecar's own package makes its user.
        shutil.copytree(REPOSITORY / "systemd", units, ignore=shutil.ignore_patterns("sysusers.d"))

    return cache.entry("agent", inputs, build)


def _build_wheels(requirements: Sequence[str], out: Path) -> None:
    _progress("building the wheels of the agent's dependencies")
    quietly([*_pip(), "wheel", "--quiet", f"--wheel-dir={out}", *requirements])


def _build_wheel(out: Path) -> None:
    quietly(
        [
            *_pip(),
            "wheel",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            f"--wheel-dir={out}",
            str(REPOSITORY),
        ]
    )


def _pip() -> list[str]:
    """pip in an environment that has the project's build requirements."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    requirements: list[str] = project["build-system"]["requires"]

    def build(out: Path) -> None:
        quietly([_HOST_PYTHON, "-m", "venv", str(out)])
        quietly([f"{out}/bin/python", "-m", "pip", "install", "--quiet", *requirements])

    # Called as a module: the scripts of an environment name the folder that it was made in.
    builder = cache.entry("builder", [*requirements, _host_version()], build)
    return [f"{builder}/bin/python", "-m", "pip"]


def _host_version() -> str:
    command = [_HOST_PYTHON, "-c", "import sysconfig; print(sysconfig.get_config_var('SOABI'))"]
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout.strip()


def in_chroot(below: Sequence[Path], layer: Path, argv: Sequence[str], *, mount: Path | None = None) -> None:
    """Run `argv` in the tree made of the layers `below`; what it changes lands in `layer`."""
    work = layer.with_name(f"{layer.name}.work")
    (work / "root").mkdir(parents=True)
    (work / "work").mkdir()
    options = overlay_options(below, upper=layer, work=work / "work")
    script = (
        'mount -t overlay overlay -o "$1" "$2"; mount --bind "$3" "$2$4"; root=$2; shift 4; exec chroot "$root" "$@"'
    )
    places = [options, str(work / "root"), str(mount or work / "root" / "mnt"), _MOUNT]
    try:
        quietly(
            ["unshare", "--mount", "/bin/sh", "-ec", script, "sh", *places, *argv],
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "PIP_NO_CACHE_DIR": "1"},
        )
    finally:
        shutil.rmtree(work)


def overlay_options(lower: Sequence[Path], *, upper: Path, work: Path) -> str:
    """The options of mount(8) for `upper` over the layers `lower`, the lowest of them first."""
    stack = ":".join(str(layer) for layer in reversed(lower))
    return f"lowerdir={stack},upperdir={upper},workdir={work}"


def _mirror() -> list[str]:
    """The Debian mirror that this host itself uses; none known, debootstrap takes its own default."""
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI)", f"Codename: {SUITE}", "Label: Debian"]
    known = subprocess.run(command, check=False, text=True, stdout=subprocess.PIPE).stdout.split()
    return known[:1]


def quietly(argv: Sequence[str], *, env: dict[str, str] | None = None) -> None:
    """Run a command; its output is shown only when it fails."""
    done = subprocess.run(argv, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env)
    if done.returncode != 0:
        raise LabError(f"{' '.join(argv)} ended with {done.returncode}:\n{done.stdout}")


def _progress(text: str) -> None:
    sys.stderr.write(f"{text} …\n")
    sys.stderr.flush()
