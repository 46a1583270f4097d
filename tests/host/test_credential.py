"""The credential as the configuration names it, and the join token that stands in for a file that is gone."""

import os
from pathlib import Path, PurePosixPath

import pytest

from factories import a_config
from vmmesh_agent import credential
from vmmesh_agent.config import ClientCertificate, Config, Credential
from vmmesh_agent.errors import FetchError
from vmmesh_agent.host import Host
from vmmesh_agent.secret import Secret

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="keeps files as root's")

JOIN_TOKEN = PurePosixPath("/etc/vmmesh-agent/join-token")
CREDENTIAL = Credential(join_token_file=JOIN_TOKEN)
FIRST, SECOND = "VM1.11111111.first", "VM1.22222222.second"


@pytest.fixture
def host(tmp_path: Path) -> Host:
    for folder in ("etc/vmmesh-agent", "var/lib/vmmesh-agent", "run/cloud-init"):
        (tmp_path / folder).mkdir(parents=True)
    return Host(tmp_path)


def put(host: Host, token: str, path: PurePosixPath = JOIN_TOKEN) -> None:
    host.outside(path).write_text(f"{token}\n")


def used(host: Host) -> str:
    token = credential.bearer(host, CREDENTIAL, None)
    assert token
    return token.reveal()


def test_a_token_that_was_taken_is_kept_for_root_alone_and_its_file_goes(host: Host) -> None:
    put(host, FIRST)
    assert credential.keep(host, Secret(FIRST))
    assert used(host) == FIRST

    assert credential.retire(host, CREDENTIAL) == ""

    assert host.status(JOIN_TOKEN) is None
    kept = host.status(credential.KEPT)
    assert kept
    assert kept.mode == 0o600
    assert used(host) == FIRST


def test_a_new_file_goes_first_and_stays_until_it_was_taken(host: Host) -> None:
    credential.keep(host, Secret(FIRST))
    put(host, SECOND)

    assert used(host) == SECOND
    credential.retire(host, CREDENTIAL)
    assert used(host) == SECOND

    assert credential.keep(host, Secret(SECOND))
    credential.retire(host, CREDENTIAL)
    assert host.status(JOIN_TOKEN) is None
    assert used(host) == SECOND


def test_a_token_that_is_kept_already_is_not_written_again(host: Host) -> None:
    credential.keep(host, Secret(FIRST))
    before = host.status(credential.KEPT)
    assert not credential.keep(host, Secret(FIRST))
    assert host.status(credential.KEPT) == before


def test_a_configuration_that_names_the_kept_one_itself_loses_nothing(host: Host) -> None:
    credential.keep(host, Secret(FIRST))
    assert credential.retire(host, Credential(join_token_file=credential.KEPT)) == ""
    assert host.read(credential.KEPT) == f"{FIRST}\n".encode()


def test_a_file_that_is_a_link_is_told_and_left(host: Host) -> None:
    put(host, FIRST, PurePosixPath("/etc/elsewhere"))
    host.outside(JOIN_TOKEN).symlink_to("/etc/elsewhere")
    credential.keep(host, Secret(FIRST))
    assert "it is a link" in credential.retire(host, CREDENTIAL)
    assert host.status(JOIN_TOKEN)


def test_other_credentials_know_nothing_of_the_kept_token(host: Host) -> None:
    credential.keep(host, Secret(FIRST))
    put(host, FIRST)
    other = Credential(bearer_token_file=JOIN_TOKEN)
    credential.retire(host, other)
    assert host.status(JOIN_TOKEN)
    host.remove(JOIN_TOKEN)
    with pytest.raises(FetchError) as caught:
        credential.bearer(host, other, None)
    assert caught.value.code == "credential-missing"


def test_what_cloud_init_complained_of_is_told_beside_a_missing_file(host: Host) -> None:
    status = host.outside(PurePosixPath("/var/lib/cloud/data/status.json"))
    status.parent.mkdir(parents=True)
    status.write_text('{"v1": {"modules-final": {"errors": ["write-files-deferred failed"]}}}')
    (host.root / "run/cloud-init/status.json").symlink_to("../../var/lib/cloud/data/status.json")
    with pytest.raises(FetchError) as caught:
        credential.bearer(host, CREDENTIAL, None)
    assert "write-files-deferred failed" in caught.value.hint


HTTPS = "https://mesh.example.com/"


@pytest.mark.parametrize(
    ("config", "needed"),
    [
        (a_config(HTTPS), []),
        (a_config(HTTPS, credential=CREDENTIAL), [JOIN_TOKEN]),
        (a_config(HTTPS, ca_file=PurePosixPath("/etc/ca.pem"), credential=CREDENTIAL), ["/etc/ca.pem", JOIN_TOKEN]),
        (a_config(HTTPS, credential=Credential(bearer_token_file=PurePosixPath("/run/token"))), ["/run/token"]),
        (
            a_config(
                HTTPS,
                credential=Credential(
                    client_certificate=ClientCertificate(PurePosixPath("/c.pem"), PurePosixPath("/c.key"))
                ),
            ),
            ["/c.pem", "/c.key"],
        ),
        (a_config(HTTPS, credential=Credential(exec=("/bin/get-token", "--now"))), ["/bin/get-token"]),
        (a_config("file:///srv/a%20bundle"), ["/srv/a bundle"]),
    ],
    ids=["nothing", "join token", "CA and token", "bearer token", "client certificate", "exec", "bundle"],
)
def test_a_request_misses_each_file_that_it_needs_until_all_are_there(
    host: Host, config: Config, needed: list[str | PurePosixPath]
) -> None:
    for path in map(PurePosixPath, needed):
        assert credential.missing(host, config) == path
        host.outside(path).parent.mkdir(exist_ok=True)
        host.outside(path).touch()
    assert credential.missing(host, config) is None


def test_a_kept_token_is_not_missed(host: Host) -> None:
    credential.keep(host, Secret(FIRST))
    assert credential.missing(host, a_config(HTTPS, credential=CREDENTIAL)) is None
