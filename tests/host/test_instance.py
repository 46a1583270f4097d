"""What an instance was given: the kernel command line, and user-data from a real server in the place of a cloud's."""

import base64
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from fakes import Answer, Endpoint, http
from vmmesh_agent import config, instance
from vmmesh_agent.errors import ConfigurationError, FetchError
from vmmesh_agent.fetch import Metadata, user_data
from vmmesh_agent.host import Host

URL = "https://mesh.example.com:15443/v1/bundle"
PIN = f"sha256:{'0' * 64}"
TOKEN = "t0k3n.s3cr3t"
Serve = Callable[..., Endpoint]


@pytest.fixture
def host(tmp_path: Path) -> Host:
    (tmp_path / "etc/vmmesh-agent").mkdir(parents=True)
    return Host(tmp_path)


@pytest.fixture
def serve() -> Iterator[Serve]:
    with ExitStack() as stack:
        yield lambda *answers: stack.enter_context(Endpoint(None, answers).serving())


def boot(host: Host, command_line: str) -> None:
    (host.root / "proc").mkdir()
    (host.root / "proc/cmdline").write_text(f"BOOT_IMAGE=/vmlinuz root=/dev/vda1 ro {command_line}\n")


def at(server: Endpoint, cloud: Metadata) -> Metadata:
    """The cloud's metadata service, where the server is."""

    def moved(url: str) -> str:
        return urlsplit(url)._replace(netloc=f"127.0.0.1:{server.port}").geturl() if url else ""

    return replace(cloud, url=moved(cloud.url), session=moved(cloud.session))


# --- the kernel command line ---


def test_settings_on_the_kernel_command_line_become_the_configuration(host: Host) -> None:
    boot(
        host,
        f"vmmesh.endpoint.url={URL} quiet vmmesh.endpoint.ca_pins={PIN} vmmesh.healthy_within=60"
        f" vmmesh.workload_group.namespace=vm 'vmmesh.workload_group.name=demo' vmmesh.join_token={TOKEN}",
    )
    instance.configure(host, None, [])
    written = (host.root / "etc/vmmesh-agent/config.d/50-instance.yaml").read_bytes()
    parsed = config.parse([(instance.FILE, written)])
    assert parsed.endpoint.url == URL
    assert parsed.endpoint.ca_pins == (PIN,)
    assert parsed.healthy_within == 60.0
    assert str(parsed.workload_group) == "vm/demo"
    assert parsed.endpoint.credential.join_token_file == instance.JOIN_TOKEN
    assert TOKEN.encode() not in written
    token = host.root / "etc/vmmesh-agent/join-token"
    assert (token.read_text().strip(), token.stat().st_mode & 0o777) == (TOKEN, 0o600)


def test_it_adds_to_what_the_image_has(host: Host) -> None:
    boot(host, "vmmesh.workload_group.name=demo vmmesh.workload_group.namespace=vm")
    image = (config.FILE, f"endpoint: {{url: '{URL}'}}".encode())
    configured = instance.configure(host, None, [image])
    assert configured
    assert (configured.endpoint.url, str(configured.workload_group)) == (URL, "vm/demo")


def test_an_instance_that_was_given_nothing_is_left_alone(host: Host) -> None:
    boot(host, "quiet")
    assert instance.configure(host, None, []) is None
    assert [path.name for path in (host.root / "etc/vmmesh-agent").iterdir()] == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("vmmesh.endpoint.url=http://mesh.example.com", "plain http"),
        ("vmmesh.endpoint.ulr=https://mesh.example.com", "did you mean endpoint.url?"),
        ("vmmesh.join_token=t0k3n", "endpoint.url"),
        ("vmmesh.endpoint.url={ vmmesh.endpoint.url={", "vmmesh.endpoint.url"),
        ("vmmesh.endpoint=x vmmesh.endpoint.url=y", "no section"),
    ],
)
def test_what_makes_no_sense_is_told_and_nothing_is_written(host: Host, given: str, said: str) -> None:
    boot(host, given)
    with pytest.raises(ConfigurationError, match=said.replace("?", r"\?")) as caught:
        instance.configure(host, None, [])
    assert "t0k3n" not in caught.value.message
    assert [path.name for path in (host.root / "etc/vmmesh-agent").iterdir()] == []


# --- user-data ---


def test_a_session_is_asked_for_first(host: Host, serve: Serve) -> None:
    server = serve(http("200 OK", b"SESSION"), http("200 OK", b"{}"))
    assert user_data(host, at(server, instance.CLOUDS["ec2"]), 30) == b"{}"
    assert server.requests[0].startswith("PUT /latest/api/token HTTP/1.1\r\n")
    assert server.header("X-aws-ec2-metadata-token-ttl-seconds") == "60"
    assert server.requests[1].startswith("GET /latest/user-data HTTP/1.1\r\n")
    assert server.header("X-aws-ec2-metadata-token", 1) == "SESSION"


def test_an_older_service_without_sessions_is_asked_without(host: Host, serve: Serve) -> None:
    server = serve(http("405 Method Not Allowed"), http("200 OK", b"{}"))
    assert user_data(host, at(server, instance.CLOUDS["ec2"]), 30) == b"{}"
    assert server.header("X-aws-ec2-metadata-token", 1) is None


@pytest.mark.parametrize(
    ("source", "name", "value"), [("gce", "Metadata-Flavor", "Google"), ("azure", "Metadata", "true")]
)
def test_the_header_that_proves_it_is_no_accident_is_sent(
    host: Host, serve: Serve, source: str, name: str, value: str
) -> None:
    server = serve(http("200 OK", b"{}"))
    user_data(host, at(server, instance.CLOUDS[source]), 30)
    assert server.header(name) == value


def test_no_user_data_is_nothing(host: Host, serve: Serve) -> None:
    assert user_data(host, at(serve(http("404 Not Found")), instance.CLOUDS["gce"]), 30) is None


def test_a_metadata_service_that_refuses_is_told(host: Host, serve: Serve) -> None:
    server = serve(http("403 Forbidden"))
    with pytest.raises(FetchError, match="no user-data") as caught:
        user_data(host, at(server, instance.CLOUDS["gce"]), 30)
    assert caught.value.code == "metadata-service-failed"


def test_a_metadata_service_that_comes_late_is_waited_for(host: Host, serve: Serve) -> None:
    server = serve(http("503 Service Unavailable"), http("200 OK", b"late"))
    assert user_data(host, at(server, instance.CLOUDS["gce"]), 30) == b"late"


GIVEN = {"vmmesh": {"endpoint": {"url": URL}, "join_token": TOKEN}, "somebody": "else's"}


@pytest.mark.parametrize(
    ("answer", "is_base64"),
    [(json.dumps(GIVEN).encode(), False), (base64.b64encode(json.dumps(GIVEN).encode()), True)],
)
def test_the_object_of_that_name_in_the_user_data_is_the_configuration(
    host: Host, serve: Serve, answer: bytes, is_base64: bool
) -> None:
    cloud = at(serve(http("200 OK", answer)), Metadata("http://cloud/data", is_base64=is_base64))
    configured = instance.configure(host, cloud, [])
    assert configured
    assert configured.endpoint.url == URL
    assert (host.root / "etc/vmmesh-agent/join-token").read_text().strip() == TOKEN


@pytest.mark.parametrize("document", [b"#cloud-config\n{}", b"[1", b'{"vmmesh": []}', b"\xff"])
def test_user_data_in_another_form_is_told(host: Host, serve: Serve, document: bytes) -> None:
    cloud = at(serve(http("200 OK", document)), Metadata("http://cloud/data"))
    with pytest.raises(ConfigurationError) as caught:
        instance.configure(host, cloud, [])
    assert caught.value.code == "instance-data-invalid"
    assert not (host.root / "etc/vmmesh-agent/config.d").exists()


@pytest.mark.parametrize("document", [b"{}", b"[]", b'"text"'])
def test_user_data_of_somebody_else_is_nothing(host: Host, serve: Serve, document: Answer) -> None:
    assert isinstance(document, bytes)
    cloud = at(serve(http("200 OK", document)), Metadata("http://cloud/data"))
    assert instance.configure(host, cloud, []) is None
