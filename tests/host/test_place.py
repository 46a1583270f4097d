"""The table of files on a real tree: what is planned is done, and then there is nothing left to do."""

import os
from datetime import timedelta
from pathlib import Path, PurePosixPath

import pytest

from factories import CLUSTER, MOMENT, STRANGER, a_bundle, a_verified_bundle
from lab.cluster import Authority
from vmmesh_agent import place
from vmmesh_agent.errors import AgentError, PlaceError
from vmmesh_agent.host import Host
from vmmesh_agent.place import TABLE, merged_roots
from vmmesh_agent.verify import VerifiedBundle

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to istio-proxy")

ISTIO = 997
PLACES = {
    "etc/certs/root-cert.pem": 0o644,
    "run/secrets/tokens/istio-token": 0o600,
    "var/lib/istio/envoy/cluster.env": 0o644,
    "var/lib/istio/config/mesh": 0o644,
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A machine on which the package was installed and nothing placed yet."""
    for folder in ("etc/certs", "var/lib/istio/envoy", "var/lib/istio/proxy", "var/lib/istio/config", "run"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "etc/istio").symlink_to("/var/lib/istio")
    (tmp_path / "var/run").symlink_to("/run")
    (tmp_path / "etc/passwd").write_text(
        f"root:x:0:0::/root:/bin/sh\nistio-proxy:x:{ISTIO}:996::/var/lib/istio:/bin/false\n"
    )
    (tmp_path / "etc/hosts").write_bytes(b"127.0.0.1 localhost\n")
    return tmp_path


@pytest.fixture
def host(tree: Path) -> Host:
    return Host(tree)


def planned(host: Host, bundle: VerifiedBundle, previous: bytes = b"") -> tuple[place.Change, ...]:
    return place.plan(host, bundle, previous, MOMENT)


def put(host: Host, bundle: VerifiedBundle, previous: bytes = b"") -> list[str]:
    """Plan and apply; return what was done."""
    changes = planned(host, bundle, previous)
    place.apply(host, changes)
    return [str(change.path) for change in changes]


def snapshot(tree: Path) -> dict[str, tuple[int, int, float, bytes | None]]:
    return {
        str(path): (
            path.lstat().st_mode,
            path.lstat().st_uid,
            path.lstat().st_mtime,
            path.read_bytes() if path.is_file() else None,
        )
        for path in sorted(tree.rglob("*"))
    }


def test_the_files_are_where_the_sidecar_reads_them_and_belong_to_it(host: Host, tree: Path) -> None:
    bundle = a_verified_bundle()
    put(host, bundle)
    found = {name: (tree / name).stat() for name in PLACES}
    assert {name: status.st_mode & 0o7777 for name, status in found.items()} == PLACES
    assert {(status.st_uid, status.st_gid) for status in found.values()} == {(ISTIO, 996)}
    assert (tree / "var/lib/istio/config/mesh").read_bytes() == bundle.mesh
    assert (tree / "run/secrets/tokens/istio-token").read_text() == bundle.token.reveal()
    assert (tree / "etc/hosts").read_bytes() == (
        b"127.0.0.1 localhost\n# BEGIN vmmesh-agent\n192.0.2.1 istiod.istio-system.svc\n# END vmmesh-agent\n"
    )
    assert (tree / "etc/hosts").stat().st_uid == 0
    folders = "var/lib/istio var/lib/istio/proxy var/lib/istio/config etc/certs run/secrets run/secrets/tokens"
    assert {(tree / folder).stat().st_uid for folder in folders.split()} == {ISTIO}


def test_a_second_plan_is_empty(host: Host, tree: Path) -> None:
    bundle = a_verified_bundle()
    put(host, bundle)
    before = snapshot(tree)
    assert planned(host, bundle) == ()
    assert put(host, bundle) == []
    assert snapshot(tree) == before


def test_planning_changes_nothing(host: Host, tree: Path) -> None:
    before = snapshot(tree)
    assert planned(host, a_verified_bundle())
    assert snapshot(tree) == before


def test_a_new_token_alone_does_not_restart_the_sidecar(host: Host) -> None:
    put(host, a_verified_bundle())
    changes = planned(host, a_verified_bundle(a_bundle(token=CLUSTER.token(lifetime=timedelta(hours=2)))))
    assert [(change.path, change.restarts) for change in changes] == [(place.TOKEN, False)]


@pytest.mark.parametrize(
    ("bundle", "file"),
    [
        (a_bundle(environment={"ISTIO_INBOUND_PORTS": "8080"}), "cluster.env"),
        (a_bundle(mesh_yaml=b"defaultConfig: {}\n"), "mesh.yaml"),
        (a_bundle(root_cert_pem=CLUSTER.root_pem + STRANGER.pem), "root-cert.pem"),
    ],
)
def test_what_the_sidecar_reads_only_at_its_start_restarts_it(host: Host, bundle: object, file: str) -> None:
    first = a_bundle()
    put(host, a_verified_bundle(first))
    second = a_verified_bundle(a_bundle(token=first.files["istio-token"].decode(), **{file: bundle.files[file]}))  # type: ignore[attr-defined]
    changes = planned(host, second)
    assert [(change.path, change.restarts) for change in changes] == [(TABLE[file].path, True)]


def test_a_wrong_owner_or_mode_is_mended_and_restarts_only_what_could_not_write(host: Host, tree: Path) -> None:
    bundle = a_verified_bundle()
    put(host, bundle)
    (tree / "run/secrets/tokens/istio-token").chmod(0o744)
    os.chown(tree / "var/lib/istio/envoy/cluster.env", 0, 0)
    os.chown(tree / "etc/certs", 0, 0)
    changes = planned(host, bundle)
    assert {change.path.name: change.restarts for change in changes} == {
        "istio-token": False, "cluster.env": False, "certs": True,
    }  # fmt: skip
    place.apply(host, changes)
    assert planned(host, bundle) == ()


def test_the_mode_that_pilot_agent_gives_its_root_certificate_is_left(host: Host, tree: Path) -> None:
    bundle = a_verified_bundle()
    put(host, bundle)
    (tree / "etc/certs/root-cert.pem").chmod(0o600)
    assert planned(host, bundle) == ()
    (tree / "etc/certs/root-cert.pem").chmod(0o666)
    assert [change.path for change in planned(host, bundle)] == [place.ROOT_CERT]


def test_what_else_is_in_the_folders_is_left_alone(host: Host, tree: Path) -> None:
    (tree / "etc/certs/key.pem").write_text("theirs")
    (tree / "etc/certs/key.pem").chmod(0o600)
    (tree / "etc/hosts").chmod(0o664)
    put(host, a_verified_bundle())
    assert (tree / "etc/certs/key.pem").stat().st_uid == 0
    assert (tree / "etc/hosts").stat().st_mode & 0o777 == 0o664


def test_an_empty_hosts_file_takes_the_block_away(host: Host, tree: Path) -> None:
    put(host, a_verified_bundle())
    mesh = b"defaultConfig: {discoveryAddress: '192.0.2.1:15012'}\n"
    put(host, a_verified_bundle(a_bundle(address="", mesh_yaml=mesh)))
    assert (tree / "etc/hosts").read_bytes() == b"127.0.0.1 localhost\n"


def test_without_the_user_nothing_is_placed(host: Host, tree: Path) -> None:
    (tree / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\n")
    changes = planned(host, a_verified_bundle())
    before = snapshot(tree)
    with pytest.raises(PlaceError) as caught:
        place.apply(host, changes)
    assert caught.value.code == "user-missing"
    assert snapshot(tree) == before


def test_a_file_where_a_folder_belongs_is_named(host: Host, tree: Path) -> None:
    (tree / "run/secrets").write_text("")
    with pytest.raises(PlaceError, match="/var/run/secrets is no folder") as caught:
        planned(host, a_verified_bundle())
    assert caught.value.code == "not-a-folder"


@pytest.mark.parametrize(
    "name", ["var/lib/istio/envoy/cluster.env", "etc/certs/root-cert.pem", "run/secrets/tokens/istio-token"]
)
def test_a_link_that_istio_proxy_laid_leads_nowhere(host: Host, tree: Path, name: str) -> None:
    put(host, a_verified_bundle())
    secret = tree / "etc/shadow"
    secret.write_text("root's own")
    (tree / name).unlink()
    (tree / name).symlink_to("/etc/shadow")
    os.chown(tree / name, ISTIO, ISTIO, follow_symlinks=False)
    try:
        put(host, a_verified_bundle())
    except AgentError as error:
        assert error.code == "foreign-link"  # noqa: PT017  # refusing is as good as replacing
    assert (secret.read_text(), secret.stat().st_uid) == ("root's own", 0)


def test_a_folder_that_istio_proxy_turned_into_a_link_leads_nowhere(host: Host, tree: Path) -> None:
    (tree / "var/lib/istio/envoy").rmdir()
    (tree / "var/lib/istio/envoy").symlink_to("/etc")
    os.chown(tree / "var/lib/istio/envoy", ISTIO, ISTIO, follow_symlinks=False)
    before = snapshot(tree)
    with pytest.raises(AgentError):
        put(host, a_verified_bundle())
    assert snapshot(tree) == before


# --- what is shown ---


def test_a_difference_is_shown_and_a_secret_is_not(host: Host) -> None:
    first = a_verified_bundle()
    assert "+(a secret of " in "\n".join(change.diff() for change in planned(host, first))
    put(host, first)
    bundle = a_verified_bundle(a_bundle(environment={"ISTIO_INBOUND_PORTS": "8080"}))
    shown = "\n".join(change.diff() for change in planned(host, bundle))
    assert "-ISTIO_INBOUND_PORTS='*'\n+ISTIO_INBOUND_PORTS='8080'" in shown
    assert "--- a/var/lib/istio/envoy/cluster.env" in shown
    assert bundle.token.reveal() not in shown
    assert bundle.token.reveal() not in repr(planned(host, bundle))


# --- roots ---

OLD, NEW, LEARNED = Authority.create("old").pem, CLUSTER.root_pem, STRANGER.pem
EXPIRED = Authority.create("expired", not_before=MOMENT - timedelta(days=2), not_after=MOMENT - timedelta(days=1)).pem
LEAF = CLUSTER.server_certificate(["a.example.com"])[0]


@pytest.mark.parametrize(
    ("new", "previous", "current", "wanted"),
    [
        (NEW, b"", b"", NEW),
        (NEW, b"", LEARNED, NEW),
        (NEW, NEW, NEW, NEW),
        (NEW, NEW, b"", NEW),
        (NEW, NEW, NEW + LEARNED, NEW + LEARNED),
        (NEW, NEW, LEARNED + NEW, LEARNED + NEW),
        (NEW, NEW, LEARNED, NEW + LEARNED),
        (NEW, OLD, OLD, NEW),
        (NEW, OLD, OLD + LEARNED, NEW + LEARNED),
        (NEW, OLD + NEW, OLD + NEW, NEW),
        (OLD + NEW, OLD, OLD, OLD + NEW),
        (NEW, NEW, NEW + EXPIRED, NEW),
        (NEW, NEW, NEW + LEAF, NEW),
        (NEW, NEW, b"broken", NEW),
        (NEW, NEW, b"\xff", NEW),
        (NEW, b"broken", NEW + LEARNED, NEW),
    ],
    ids=[
        "first join", "first join over a stranger's", "unchanged", "gone", "istiod brought one", "in another order",
        "rolled forward", "replaced", "replaced while one was learned", "the cluster dropped one", "rotation begins",
        "an expired one", "no CA", "damaged", "no text", "the record is damaged",
    ],
)  # fmt: skip
def test_roots_that_the_sidecar_learned_stay_and_those_that_the_cluster_dropped_go(
    new: bytes, previous: bytes, current: bytes, wanted: bytes
) -> None:
    merged = merged_roots(new, previous, current, MOMENT)
    assert merged == wanted
    assert merged_roots(new, new, merged, MOMENT) == merged


def test_a_learned_root_survives_the_next_bundle(host: Host, tree: Path) -> None:
    bundle = a_bundle()
    put(host, a_verified_bundle(bundle))
    (tree / "etc/certs/root-cert.pem").write_bytes(CLUSTER.root_pem + STRANGER.pem)
    assert planned(host, a_verified_bundle(bundle), previous=bundle.files["root-cert.pem"]) == ()


def test_the_table_is_the_documented_one() -> None:
    assert {entry.path for entry in TABLE.values()} == {
        PurePosixPath("/etc/certs/root-cert.pem"),
        PurePosixPath("/var/run/secrets/tokens/istio-token"),
        PurePosixPath("/var/lib/istio/envoy/cluster.env"),
        PurePosixPath("/etc/istio/config/mesh"),
    }
    assert [name for name, entry in TABLE.items() if entry.is_secret] == ["istio-token"]


class Running(Host):
    """A tree as if it were the running machine's: of another tree nobody knows the resolver."""

    @property
    def is_running(self) -> bool:
        return True


def test_the_agents_own_lines_find_no_name(tmp_path: Path) -> None:
    host = Running(tmp_path)
    (tmp_path / "etc").mkdir()
    ours = "# BEGIN vmmesh-agent\n192.0.2.1 istiod.istio-system.svc\n# END vmmesh-agent\n"
    (tmp_path / "etc/hosts").write_text(f"127.0.0.1 localhost\n{ours}")
    assert not place.resolves(host, "istiod.istio-system.svc")
    (tmp_path / "etc/hosts").write_text(f"192.0.2.2 istiod.istio-system.svc\n{ours}")
    assert place.resolves(host, "istiod.istio-system.svc")
