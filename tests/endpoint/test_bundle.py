"""What is served, to whom, and what the others are told."""

from datetime import timedelta

import pytest

from endpoint.serving import Setup, error_of, eventually
from lab.cluster import now


def test_the_bundle_is_format_1_with_the_workload_of_cluster_env(setup: Setup) -> None:
    setup.put(setup.cluster.bundle(workload="web.front", namespace="shop"))
    token = setup.token()
    with setup.serving() as server:
        answer = server.get(token=token)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/vnd.vmmesh.bundle.v1+json"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.json() == {
        "version": 1,
        "workload": {"namespace": "shop", "name": "web.front"},
        "files": {path.name: path.read_text() for path in setup.bundle_dir.iterdir()},
    }


def test_an_empty_hosts_file_is_served(setup: Setup) -> None:
    setup.put(setup.cluster.bundle(address=""))
    token = setup.token()
    with setup.serving() as server:
        assert server.get(token=token).json()["files"]["hosts"] == ""


def test_who_has_the_bundle_is_told_so_and_nothing_else(setup: Setup) -> None:
    token = setup.token()
    with setup.serving() as server:
        first = server.get(token=token)
        etag = first.headers["etag"]
        assert etag.startswith('"')
        again = server.get(token=token, if_none_match=etag)
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag)
        assert server.get(token=token, if_none_match=f'"other", W/{etag}').status_code == 304
        assert server.get(token=token, if_none_match='"other"').content == first.content
        assert error_of(server.get(if_none_match=etag)) == (401, "credential-missing")


def test_head_answers_as_get_without_the_body(setup: Setup) -> None:
    token = setup.token()
    with setup.serving() as server:
        full = server.get(token=token)
        head = server.get(token=token, method="HEAD")
    assert (head.status_code, head.content) == (200, b"")
    for header in ("etag", "content-length", "content-type"):
        assert head.headers[header] == full.headers[header]


def test_a_renewed_token_is_served_without_a_restart(setup: Setup) -> None:
    token = setup.token()
    with setup.serving() as server:
        old = server.get(token=token)
        renewed = setup.cluster.bundle(token=setup.cluster.token(lifetime=timedelta(hours=2)))
        setup.put(renewed)
        new = eventually(
            lambda: server.get(token=token, if_none_match=old.headers["etag"]),
            lambda answer: answer.status_code == 200,
        )
    assert new.json()["files"]["istio-token"] == renewed["istio-token"].decode()
    assert new.headers["etag"] != old.headers["etag"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("istio-token", None),
        ("istio-token", b""),
        ("istio-token", b"eyJhbGciOiJSUzI1NiJ9.eyJhdWQ"),
        ("root-cert.pem", b"-----BEGIN CERTIFICATE-----\nMIIB"),
        ("cluster.env", b"CANONICAL_REVISION='latest'\n"),
        ("mesh.yaml", b"\n"),
        ("hosts", None),
        ("hosts", b"\xff\xfe"),
        ("mesh.yaml", b"defaultConfig: " + bytes(1024 * 1024)),
    ],
)
def test_a_set_that_is_not_complete_is_not_served(setup: Setup, name: str, content: bytes | None) -> None:
    (setup.bundle_dir / name).unlink()
    if content is not None:
        (setup.bundle_dir / name).write_bytes(content)
    token = setup.token()
    with setup.serving() as server:
        answer = server.get(token=token)
        assert error_of(answer) == (503, "bundle-incomplete")
        assert name in answer.json()["error"]["message"]
        assert int(answer.headers["retry-after"]) > 0
        assert error_of(server.get()) == (401, "credential-missing")
        setup.put(setup.cluster.bundle())
        mended = eventually(lambda: server.get(token=token), lambda answer: answer.status_code == 200)
        assert mended.status_code == 200


def test_a_bundle_that_is_taken_away_is_no_longer_served(setup: Setup) -> None:
    token = setup.token()
    with setup.serving() as server:
        assert server.get(token=token).status_code == 200
        (setup.bundle_dir / "istio-token").unlink()
        answer = eventually(lambda: server.get(token=token), lambda answer: answer.status_code != 200)
        assert error_of(answer) == (503, "bundle-incomplete")


def test_an_expired_token_is_not_served_and_the_log_says_what_to_do(setup: Setup) -> None:
    expired = setup.cluster.token(issued_at=now() - timedelta(hours=2))
    setup.put(setup.cluster.bundle(token=expired))
    token = setup.token()
    with setup.serving() as server:
        answer = server.get(token=token)
        assert error_of(answer) == (503, "bundle-expired")
        assert "istioctl" in answer.json()["error"]["message"]
        warnings = server.log_lines("nothing to serve")
        assert [(line["reason"], "istioctl" in line["message"]) for line in warnings] == [("bundle-expired", True)]


def test_another_workload_group_is_not_served_and_only_an_authenticated_caller_learns_which_is(setup: Setup) -> None:
    token = setup.token()
    with setup.serving() as server:
        assert server.get(token=token, vmmesh_workload_group="vm/demo").status_code == 200
        answer = server.get(token=token, vmmesh_workload_group="vm/other")
        assert error_of(answer) == (404, "workload-not-served")
        assert "vm/demo" in answer.json()["error"]["message"]
        stranger = server.get(vmmesh_workload_group="vm/other")
        assert error_of(stranger) == (401, "credential-missing")
        assert "demo" not in stranger.text


def test_a_token_for_another_workload_gets_nothing_and_is_not_used_up(setup: Setup) -> None:
    token = setup.token("--workload", "vm/other")
    with setup.serving() as server:
        answer = server.get(token=token)
    assert error_of(answer) == (403, "workload-not-permitted")
    assert "demo" not in answer.text
    assert "0/1" in setup.run("token", "list", "--state-dir", setup.state).stdout


@pytest.mark.parametrize(
    "authorization", ["Bearer nonsense", "Basic dm06c2VjcmV0", "Bearer", "Bearer VM1.aaaaaaaa." + "0" * 64]
)
def test_an_unknown_credential_is_refused(setup: Setup, authorization: str) -> None:
    setup.token()
    with setup.serving() as server:
        answer = server.get(authorization=authorization, vmmesh_machine="ab")
    assert error_of(answer) == (401, "credential-unknown")
    assert answer.headers["www-authenticate"].startswith("Bearer")


def test_what_is_not_there_or_not_a_get_is_refused_in_json(setup: Setup) -> None:
    token = setup.token()
    with setup.serving() as server:
        for path in ("/", "/v1/bundle/", "/v1/packages/../../etc/passwd", "/v2/bundle"):
            assert error_of(server.get(path, token=token)) == (404, "not-found")
        answer = server.get(token=token, method="POST")
        assert error_of(answer) == (405, "method-not-allowed")
        assert set(answer.headers["allow"].replace(" ", "").split(",")) == {"GET", "HEAD"}


def test_a_host_header_that_is_no_host_is_refused(setup: Setup) -> None:
    token = setup.token()
    with setup.serving() as server:
        assert error_of(server.get(token=token, host="evil/../x")) == (400, "host-invalid")


def test_healthz_needs_no_credential_and_says_nothing_of_the_bundle(setup: Setup) -> None:
    setup.token()
    with setup.serving() as server:
        answer = server.get("/healthz")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


def test_an_address_that_keeps_failing_is_told_to_wait_and_a_sound_machine_behind_it_is_not_shut_out(
    setup: Setup,
) -> None:
    token = setup.token()
    with setup.serving() as server:
        answers = [server.get(token="wrong") for _ in range(12)]
        assert [answer.status_code for answer in answers] == [401] * 10 + [429] * 2
        assert error_of(answers[-1]) == (429, "too-many-failures")
        assert 0 < int(answers[-1].headers["retry-after"]) <= 60
        assert server.get(token=token).status_code == 200


def test_each_request_is_one_line_of_the_log_without_any_secret(setup: Setup) -> None:
    token = setup.token("--machines", "2")
    secret = token.split(".")[2]
    with setup.serving() as server:
        server.get(token=token)
        server.get(token="forged" + secret)
        server.get(f"/v1/bundle/{token}?token={token}")
        server.get("/v1/bundle?token=" + secret)
        server.get("/new%0Aline")
        lines, log = server.requests(5), server.log()
    requests = [(line["path"], line["status"], line.get("reason")) for line in lines]
    token_id = token.split(".")[1]
    assert requests == [
        ("/v1/bundle", 200, None),
        ("/v1/bundle", 401, "credential-unknown"),
        (f"/v1/bundle/VM1.{token_id}.…", 404, "not-found"),
        ("/v1/bundle", 401, "credential-missing"),
        ("/new\nline", 404, "not-found"),
    ]
    assert {"time", "client", "method", "machine", "token_id"} <= set(lines[0])
    assert lines[0]["token_id"] == token_id
    bundle = setup.cluster.bundle()
    for forbidden in (secret, (setup.bundle_dir / "istio-token").read_text(), bundle["root-cert.pem"].decode()):
        assert forbidden not in log
