"""May this bundle be trusted? Every reason against one, and everything that must be accepted."""

import base64
import dataclasses
import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from factories import (
    CLUSTER,
    DEMO,
    MOMENT,
    STRANGER,
    a_bundle,
    a_package,
    a_verified_bundle,
    anything,
    nothing,
    the_example_of_1_12,
)
from lab.cluster import Authority, environment_file
from vmmesh_agent import clusterenv
from vmmesh_agent.bundle import FILES, Bundle, BundleRefusedError, Sidecar, Workload
from vmmesh_agent.hosts import HostsLine
from vmmesh_agent.verify import VerifiedBundle, verify

HOUR = timedelta(hours=1)


def refusals(bundle: Bundle, **arguments: Any) -> set[tuple[str, str]]:
    """Return file and code of every problem of a bundle that must be refused."""
    with pytest.raises(BundleRefusedError) as caught:
        verify(bundle, MOMENT, **{"resolves": nothing, **arguments})
    assert all(problem.message for problem in caught.value.problems)
    assert "-----BEGIN" not in str(caught.value)
    return {(problem.file, problem.code) for problem in caught.value.problems}


def jwt(claims: Mapping[str, Any] | bytes | str, header: Mapping[str, Any] | None = None) -> bytes:
    """Put a token together by hand, its signature nonsense."""

    def part(content: object) -> str:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        return base64.urlsafe_b64encode(raw).decode().rstrip("=")

    return f"{part(header or {'alg': 'RS256'})}.{part(claims)}.c2lnbmF0dXJl".encode()


def claims(**changes: Any) -> dict[str, Any]:
    usual = {"aud": ["istio-ca"], "exp": int((MOMENT + HOUR).timestamp()), "sub": "system:serviceaccount:vm:vm"}
    return {name: value for name, value in (usual | changes).items() if value is not None}


def accepted(bundle: Bundle, **arguments: Any) -> VerifiedBundle:
    return verify(bundle, MOMENT, **{"resolves": nothing, **arguments})


# --- what must be accepted ---


def test_a_sound_bundle_is_returned_as_what_may_be_placed() -> None:
    bundle = a_bundle()
    verified = accepted(bundle)
    assert verified.workload == DEMO
    assert verified.root_cert == CLUSTER.root_pem
    assert verified.token.reveal().encode() == bundle.files["istio-token"]
    assert verified.token_expires_at - (verified.token_issued_at or MOMENT) == HOUR
    assert verified.cluster_env == bundle.files["cluster.env"]
    assert verified.mesh == bundle.files["mesh.yaml"]
    assert verified.discovery == "istiod.istio-system.svc:15012"
    assert verified.hosts == (HostsLine("192.0.2.1", ("istiod.istio-system.svc",)),)
    assert verified.notes == ()


def test_the_example_of_release_1_12_is_accepted_and_stays_byte_for_byte() -> None:
    bundle = the_example_of_1_12()
    verified = accepted(bundle, expected=Workload("shop", "orders"))
    assert verified.workload == Workload("shop", "orders")
    assert verified.cluster_env == bundle.files["cluster.env"]
    assert verified.mesh == bundle.files["mesh.yaml"]
    assert str(verified.hosts[0]) == "198.51.100.7 istiod.istio-system.svc"


@pytest.mark.parametrize("as_of", ["1.12", "newest"])
def test_what_istioctl_writes_is_placed_as_it_wrote_it(as_of: Any) -> None:
    bundle = a_bundle(as_of=as_of)
    assert accepted(bundle).cluster_env == bundle.files["cluster.env"]


def test_port_22_is_excluded_by_the_newest_release() -> None:
    assert accepted(a_bundle()).variables["ISTIO_LOCAL_EXCLUDE_PORTS"] == "22,15090,15021,15020"


ADDED_VALUES = {
    "an inner quote": "it's",
    "quotes only": "''''",
    "double quotes": 'say "hello"',
    "a backslash": r"a\nb",
    "what a shell would expand": "$(id) `id` ${HOME} $0 ~ * ? [a-z] {a,b} !! #",
    "JSON": '[{"name":"http","containerPort":8080,"protocol":"TCP"}]',
    "JSON with a quote": '{"owner":"Frank O\'Hara"}',
    "nothing": "",
    "spaces": "  two  ",
    "letters of the world": "größe 东 ✓",
    "a long one": "x" * 20_000,
}


@pytest.mark.parametrize("value", ADDED_VALUES.values(), ids=list(ADDED_VALUES))
def test_keys_that_later_releases_add_are_kept_with(value: str) -> None:
    verified = accepted(a_bundle(environment={"ISTIO_META_ADDED_LATER": value}))
    assert verified.variables["ISTIO_META_ADDED_LATER"] == value
    assert clusterenv.parse(verified.cluster_env.decode()) == (dict(verified.variables), [])


@pytest.mark.parametrize(
    "environment",
    [
        {"ISTIO_INBOUND_PORTS": "8080,9090"},
        {"ISTIO_SVC_IP": "10.1.2.3"},
        {"ISTIO_SVC_IP": "2001:db8::3", "REWRITE_PROBE_LEGACY_LOCALHOST_DESTINATION": "true"},
        {"ISTIO_META_POD_PORTS": '[{"containerPort":8080,"name":"http"}]'},
        {"ISTIO_META_AUTO_REGISTER_GROUP": "demo"},
        {"ISTIO_META_DNS_CAPTURE": None},
        {"TRUST_DOMAIN": ""},
        {"TRUST_DOMAIN": "td.example.com"},
        {"ISTIO_SERVICE_CIDR": "10.96.0.0/12,2001:db8::/64"},
        {"my_Own_metadata": "anything", "ISTIO_META_X": "{}"},
    ],
    ids=str,
)
def test_what_istioctl_may_write_into_cluster_env_is_accepted(environment: dict[str, str | None]) -> None:
    bundle = a_bundle(environment=environment)
    assert accepted(bundle).cluster_env == bundle.files["cluster.env"]


def test_comments_blank_lines_and_crlf_in_cluster_env_are_not_passed_on() -> None:
    plain = a_bundle()
    lines = plain.files["cluster.env"].decode().splitlines()
    edited = "# made by hand\r\n\r\n" + "\r\n".join(lines) + "\r\n"
    assert accepted(a_bundle(cluster_env=edited.encode())).cluster_env == plain.files["cluster.env"]


def test_a_bundle_whose_files_all_went_through_windows_is_accepted() -> None:
    files = {name: content.replace(b"\n", b"\r\n") for name, content in a_bundle().files.items()}
    files["istio-token"] += b"\r\n"
    verified = accepted(Bundle(files))
    assert verified.root_cert == CLUSTER.root_pem
    assert b"\r" not in verified.cluster_env
    assert not verified.token.reveal().endswith(("\r", "\n"))


def test_several_roots_are_accepted_while_the_mesh_rotates_its_root() -> None:
    both = CLUSTER.root_pem + STRANGER.pem
    assert accepted(a_bundle(root_cert_pem=both)).root_cert == both


def test_an_expired_root_beside_a_current_one_is_worth_a_note() -> None:
    old = Authority.create(not_before=MOMENT - 3 * HOUR, not_after=MOMENT - HOUR)
    verified = accepted(a_bundle(root_cert_pem=old.pem + CLUSTER.root_pem))
    assert verified.root_cert == old.pem + CLUSTER.root_pem
    assert [note for note in verified.notes if "certificate 1 of 2 expired" in note]


def test_a_root_that_begins_a_few_seconds_from_now_is_accepted() -> None:
    young = Authority.create(not_before=MOMENT + timedelta(seconds=30))
    assert accepted(a_bundle(root_cert_pem=young.pem)).root_cert == young.pem


def test_text_around_the_certificates_is_left_out() -> None:
    verbose = b"# the mesh's root\nsubject=O = cluster.local\n" + CLUSTER.root_pem + b"\n# end\n"
    assert accepted(a_bundle(root_cert_pem=verbose)).root_cert == CLUSTER.root_pem


def test_hosts_may_name_istiod_by_ipv6() -> None:
    bundle = a_bundle(hosts=b"2001:0DB8:0::15 istiod.istio-system.svc\n")
    assert accepted(bundle).hosts == (HostsLine("2001:db8::15", ("istiod.istio-system.svc",)),)


def test_an_empty_hosts_file_is_accepted_where_mesh_yaml_names_an_address() -> None:
    for address in ("192.0.2.9:15012", "[2001:db8::9]:15012"):
        mesh = f'defaultConfig: {{discoveryAddress: "{address}"}}'.encode()
        verified = accepted(a_bundle(address="", mesh_yaml=mesh))
        assert (verified.discovery, verified.hosts) == (address, ())


def test_an_empty_hosts_file_is_accepted_where_the_machine_resolves_the_name() -> None:
    asked: list[str] = []
    verified = accepted(a_bundle(address=""), resolves=lambda name: not asked.append(name))  # type: ignore[func-returns-value]
    assert asked == ["istiod.istio-system.svc"]
    assert len(verified.notes) == 1


def test_a_revision_has_names_of_its_own() -> None:
    verified = accepted(a_bundle(revision="1-28-2"))
    assert verified.discovery == "istiod-1-28-2.istio-system.svc:15012"
    assert verified.variables["CA_ADDR"] == verified.discovery
    assert verified.hosts[0].names == ("istiod-1-28-2.istio-system.svc",)


def test_mesh_yaml_without_a_discovery_address_means_istios_default() -> None:
    assert accepted(a_bundle(mesh_yaml=b"defaultConfig: {}\n")).discovery == "istiod.istio-system.svc:15012"


def test_a_token_of_the_old_kind_is_accepted() -> None:
    assert accepted(a_bundle(istio_token=jwt(claims(aud="istio-ca", iat=None)))).token_issued_at is None


def test_a_token_of_another_issuer_says_nothing_of_kubernetes() -> None:
    assert accepted(a_bundle(istio_token=jwt(claims(sub="machine-7")))).workload == DEMO


def test_a_token_may_be_for_several_audiences() -> None:
    assert accepted(a_bundle(istio_token=jwt(claims(aud=["https://kubernetes", "istio-ca"]))))


def test_a_token_that_the_issuer_made_shorter_is_believed() -> None:
    short = CLUSTER.token(lifetime=timedelta(minutes=10), issued_at=MOMENT)
    assert accepted(a_bundle(token=short)).token_expires_at == MOMENT + timedelta(minutes=10)


def test_a_token_issued_by_a_clock_that_is_some_seconds_ahead_is_accepted() -> None:
    assert accepted(a_bundle(token=CLUSTER.token(issued_at=MOMENT + timedelta(seconds=45))))


def test_the_package_of_the_bundle_is_passed_on() -> None:
    sidecar = Sidecar("1.28.2", (a_package(), a_package(format="rpm", arch="x86_64")))
    assert accepted(a_bundle(sidecar=sidecar)).sidecar == sidecar


def test_a_verified_bundle_shows_no_secret() -> None:
    verified = a_verified_bundle()
    shown = repr(verified) + str(verified)
    assert verified.token.reveal() not in shown
    assert verified.token.reveal().split(".")[1] not in shown


def test_what_was_verified_cannot_be_changed_afterwards() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        a_verified_bundle().mesh = b""  # type: ignore[misc]


# --- every reason against one ---

HOSTS = b"192.0.2.1 istiod.istio-system.svc\n"
LONG_AGO = datetime(2001, 1, 1, tzinfo=UTC)

REFUSED: dict[str, tuple[Bundle, tuple[str, str]]] = {
    **{
        f"{name} is missing": (Bundle({k: v for k, v in a_bundle().files.items() if k != name}), (name, "file-missing"))
        for name in FILES
    },
    **{
        f"{name} is empty": (Bundle({**a_bundle().files, name: b" \n"}), (name, "file-empty"))
        for name in FILES
        if name != "hosts"
    },
    **{
        f"{name} is no text": (Bundle({**a_bundle().files, name: b"\xff\xfe\x00"}), (name, "file-not-text"))
        for name in FILES
    },
    **{
        f"{name} is huge": (Bundle({**a_bundle().files, name: b"#" * (1024**2 + 1)}), (name, "file-too-large"))
        for name in FILES
    },
    "the root is no certificate": (a_bundle(root_cert_pem=b"hello\n"), ("root-cert.pem", "root-cert-invalid")),
    "the root is cut off": (a_bundle(root_cert_pem=CLUSTER.root_pem[:-40]), ("root-cert.pem", "root-cert-invalid")),
    "the root is damaged": (
        a_bundle(root_cert_pem=CLUSTER.root_pem.replace(b"M", b"N", 1)),
        ("root-cert.pem", "root-cert-invalid"),
    ),
    "a key lies beside the root": (
        a_bundle(root_cert_pem=CLUSTER.root_pem + CLUSTER.root.key_pem),
        ("root-cert.pem", "root-cert-invalid"),
    ),
    "the root is no CA": (
        a_bundle(root_cert_pem=Authority.create(is_ca=False).pem),
        ("root-cert.pem", "root-cert-not-ca"),
    ),
    "one of two roots is no CA": (
        a_bundle(root_cert_pem=CLUSTER.root_pem + CLUSTER.server_certificate(["a.example.com"])[0]),
        ("root-cert.pem", "root-cert-not-ca"),
    ),
    "the root has expired": (
        a_bundle(root_cert_pem=Authority.create(not_before=LONG_AGO, not_after=MOMENT).pem),
        ("root-cert.pem", "root-cert-not-in-date"),
    ),
    "the root is not valid yet": (
        a_bundle(root_cert_pem=Authority.create(not_before=MOMENT + HOUR).pem),
        ("root-cert.pem", "root-cert-not-in-date"),
    ),
    "the token is one word": (a_bundle(istio_token=b"secret"), ("istio-token", "token-not-jwt")),
    "the token has no signature": (a_bundle(istio_token=jwt(claims())[:-12]), ("istio-token", "token-not-jwt")),
    "the token is followed by more": (
        a_bundle(istio_token=jwt(claims()) + b"\nmore"),
        ("istio-token", "token-not-jwt"),
    ),
    "the token's claims are no JSON": (a_bundle(istio_token=jwt(b"hello")), ("istio-token", "token-not-jwt")),
    "the token's claims are a list": (a_bundle(istio_token=jwt(b"[]")), ("istio-token", "token-not-jwt")),
    "the token's claims are nested without end": (
        a_bundle(istio_token=jwt(b"[" * 20_000)),
        ("istio-token", "token-not-jwt"),
    ),
    "the token's claims have one twice": (
        a_bundle(istio_token=jwt(b'{"exp": 1, "exp": 9999999999}')),
        ("istio-token", "token-not-jwt"),
    ),
    "the token's expiry has 5000 digits": (
        a_bundle(istio_token=jwt(b'{"exp": ' + b"9" * 5000 + b"}")),
        ("istio-token", "token-not-jwt"),
    ),
    "the token's expiry is a word": (a_bundle(istio_token=jwt(claims(exp="soon"))), ("istio-token", "token-not-jwt")),
    "the token's expiry is true": (a_bundle(istio_token=jwt(claims(exp=True))), ("istio-token", "token-not-jwt")),
    "the token's expiry is out of this world": (
        a_bundle(istio_token=jwt(claims(exp=10**30))),
        ("istio-token", "token-not-jwt"),
    ),
    "the token's expiry is not a number": (
        a_bundle(istio_token=jwt(b'{"aud": "istio-ca", "exp": NaN}')),
        ("istio-token", "token-not-jwt"),
    ),
    "the token is not signed": (
        a_bundle(istio_token=jwt(claims(), {"alg": "none"})),
        ("istio-token", "token-not-signed"),
    ),
    "the token names no algorithm": (
        a_bundle(istio_token=jwt(claims(), {"typ": "JWT"})),
        ("istio-token", "token-not-signed"),
    ),
    "the token is for another audience": (
        a_bundle(token=CLUSTER.token(audience="https://kubernetes.default.svc")),
        ("istio-token", "token-wrong-audience"),
    ),
    "the token is for no audience": (
        a_bundle(istio_token=jwt(claims(aud=None))),
        ("istio-token", "token-wrong-audience"),
    ),
    "the token's audience only begins so": (
        a_bundle(istio_token=jwt(claims(aud="istio-ca.example.com"))),
        ("istio-token", "token-wrong-audience"),
    ),
    "the token never expires": (a_bundle(istio_token=jwt(claims(exp=None))), ("istio-token", "token-without-expiry")),
    "the token has expired": (
        a_bundle(token=CLUSTER.token(issued_at=MOMENT - HOUR)),
        ("istio-token", "token-expired"),
    ),
    "the token is not valid yet": (
        a_bundle(token=CLUSTER.token(issued_at=MOMENT + timedelta(minutes=5))),
        ("istio-token", "token-not-yet-valid"),
    ),
    "the token is for another namespace": (
        a_bundle(token=CLUSTER.token(namespace="prod")),
        ("istio-token", "token-wrong-namespace"),
    ),
    "the token is for another service account": (
        a_bundle(token=CLUSTER.token(service_account="admin")),
        ("istio-token", "token-wrong-service-account"),
    ),
    "cluster.env runs a command": (
        a_bundle(cluster_env=a_bundle().files["cluster.env"] + b'X="$(id)"\n'),
        ("cluster.env", "cluster-env-refused"),
    ),
    "cluster.env does not say for whom it is": (
        a_bundle(environment={"POD_NAMESPACE": None, "ISTIO_NAMESPACE": None}),
        ("cluster.env", "cluster-env-incomplete"),
    ),
    "cluster.env names no workload": (
        a_bundle(environment={"ISTIO_META_WORKLOAD_NAME": None, "ISTIO_SERVICE": None}),
        ("cluster.env", "cluster-env-incomplete"),
    ),
    "cluster.env is for two namespaces": (
        a_bundle(environment={"POD_NAMESPACE": "other"}),
        ("cluster.env", "cluster-env-incomplete"),
    ),
    "the bundle came for another workload": (
        a_bundle(workload=Workload("vm", "other")),
        ("cluster.env", "wrong-workload"),
    ),
    "mesh.yaml is no YAML": (a_bundle(mesh_yaml=b"a: [\n"), ("mesh.yaml", "mesh-malformed")),
    "mesh.yaml is a list": (a_bundle(mesh_yaml=b"- a\n"), ("mesh.yaml", "mesh-malformed")),
    "mesh.yaml has no default configuration": (a_bundle(mesh_yaml=b"other: {}\n"), ("mesh.yaml", "mesh-malformed")),
    "mesh.yaml has it twice": (
        a_bundle(mesh_yaml=b"defaultConfig: {}\ndefaultConfig: {}\n"),
        ("mesh.yaml", "mesh-malformed"),
    ),
    "mesh.yaml would make an object": (
        a_bundle(mesh_yaml=b"defaultConfig: !!python/object/apply:os.getpid []\n"),
        ("mesh.yaml", "mesh-malformed"),
    ),
    **{
        f"istiod is at {address!r}": (
            a_bundle(mesh_yaml=json.dumps({"defaultConfig": {"discoveryAddress": address}}).encode()),
            ("mesh.yaml", "mesh-malformed"),
        )
        for address in ("istiod", "istiod:0", "istiod:65536", "istiod:http", "a b:1", "-:", 15012, None, ["a:1"], "")
    },
    "hosts has no address": (a_bundle(hosts=HOSTS + b"istiod.istio-system.svc\n"), ("hosts", "hosts-malformed")),
    "hosts has an address alone": (a_bundle(hosts=HOSTS + b"192.0.2.1\n"), ("hosts", "hosts-malformed")),
    "hosts names a search engine": (
        a_bundle(hosts=b"192.0.2.1 istiod.istio-system.svc search.example.com\n"),
        ("hosts", "hosts-foreign-name"),
    ),
    "hosts names localhost": (
        a_bundle(hosts=b"192.0.2.1 istiod.istio-system.svc localhost\n"),
        ("hosts", "hosts-foreign-name"),
    ),
    "istiod is not to be found": (a_bundle(address=""), ("hosts", "istiod-not-found")),
    "hosts names another istiod only": (
        a_bundle(hosts=b"192.0.2.1 istiod-canary.istio-system.svc\n"),
        ("hosts", "istiod-not-found"),
    ),
    "a package has no digest": (
        a_bundle(sidecar=Sidecar("1", (a_package(sha256=""),))),
        ("", "package-without-digest"),
    ),
    "a package has a digest of another kind": (
        a_bundle(sidecar=Sidecar("1", (a_package(sha256="ab" * 20),))),
        ("", "package-without-digest"),
    ),
    "a package comes over plain HTTP": (
        a_bundle(sidecar=Sidecar("1", (a_package(url="http://mesh.example.com/a.deb"),))),
        ("", "package-not-https"),
    ),
}


@pytest.mark.parametrize(("bundle", "problem"), REFUSED.values(), ids=list(REFUSED))
def test_a_bundle_is_refused_where(bundle: Bundle, problem: tuple[str, str]) -> None:
    assert refusals(bundle) == {problem}


def test_a_bundle_for_another_workload_than_configured_is_refused() -> None:
    assert refusals(a_bundle(), expected=Workload("vm", "other")) == {("cluster.env", "wrong-workload")}
    assert refusals(a_bundle(), expected=Workload("prod", "demo")) == {("cluster.env", "wrong-workload")}


def test_a_bundle_of_another_workload_is_told_once_whoever_expected_which() -> None:
    for delivered in (Workload("vm", "other"), Workload("vm", "third")):
        with pytest.raises(BundleRefusedError) as caught:
            verify(a_bundle(workload=delivered), MOMENT, resolves=nothing, expected=Workload("vm", "other"))
        (problem,) = caught.value.problems
        says = f"the bundle says it is for {delivered} and the configuration asks for vm/other"
        assert problem.message == f"it is for vm/demo, but {says}"


def test_hosts_may_not_name_the_machine_itself() -> None:
    hosts = b"192.0.2.1 istiod.istio-system.svc istiod.shop.svc istiod\n"
    mesh = b"defaultConfig: {discoveryAddress: 'istiod.istio-system.svc:15012'}"
    bundle = a_bundle(hosts=hosts, mesh_yaml=mesh)
    assert ("hosts", "hosts-foreign-name") in refusals(bundle, host_name="istiod.shop.svc")


def test_a_mesh_yaml_that_names_itself_a_billion_times_is_refused() -> None:
    lines = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10) if n else 'lol'}]" for n in range(7)]
    mesh = "\n".join([*lines, "defaultConfig: {discoveryAddress: *a6}", ""])
    assert refusals(a_bundle(mesh_yaml=mesh.encode())) == {("mesh.yaml", "mesh-malformed")}


def test_everything_that_is_wrong_is_said_at_once() -> None:
    bundle = a_bundle(
        root_cert_pem=b"hello",
        token=CLUSTER.token(audience="other", issued_at=MOMENT - 2 * HOUR, namespace="prod", service_account="x"),
        environment={"LD_PRELOAD": "/tmp/evil.so", "ISTIO_INBOUND_PORTS": "99999"},
        mesh_yaml=b"[",
        hosts=b"nowhere istiod\n0.0.0.0 istiod.istio-system.svc\n",
        workload=Workload("vm", "other"),
        sidecar=Sidecar("1", (a_package(url="ftp://x", sha256="?"),)),
    )
    with pytest.raises(BundleRefusedError) as caught:
        verify(bundle, MOMENT, resolves=nothing)
    codes = [problem.code for problem in caught.value.problems]
    assert sorted(codes) == sorted(
        """
        root-cert-invalid token-wrong-audience token-expired token-wrong-namespace token-wrong-service-account
        cluster-env-refused cluster-env-refused mesh-malformed hosts-malformed hosts-malformed wrong-workload
        package-without-digest package-not-https
        """.split()
    )
    assert all(code in caught.value.message for code in codes)


def test_a_refusal_shows_no_part_of_the_token() -> None:
    token = CLUSTER.token(audience="other", issued_at=MOMENT - 2 * HOUR)
    with pytest.raises(BundleRefusedError) as caught:
        verify(a_bundle(token=token), MOMENT, resolves=nothing)
    assert not [part for part in token.split(".") if part in caught.value.message + caught.value.hint]


def test_a_refusal_is_short_and_printable_whatever_the_bundle_holds() -> None:
    bundle = a_bundle(
        environment={"X\x1b[2J": "1", "ISTIO_NAMESPACE": "\x1b[2J" * 1000},
        mesh_yaml=json.dumps({"defaultConfig": {"discoveryAddress": "\x1b[2J" * 1000}}).encode(),
        hosts=b"fe80::1%\x1b[2J istiod.istio-system.svc\n192.0.2.1 \x1b[2J\n",
    )
    with pytest.raises(BundleRefusedError) as caught:
        verify(bundle, MOMENT, resolves=nothing)
    for problem in caught.value.problems:
        assert problem.message.isprintable()
        assert len(problem.message) < 500


def test_a_bundle_that_is_sound_now_is_refused_when_its_token_has_run_out() -> None:
    bundle = a_bundle(token=CLUSTER.token(issued_at=MOMENT))
    assert verify(bundle, MOMENT + HOUR - timedelta(seconds=1), resolves=anything)
    with pytest.raises(BundleRefusedError) as caught:
        verify(bundle, MOMENT + HOUR, resolves=anything)
    assert caught.value.code == "token-expired"


def test_what_is_placed_is_read_back_as_what_was_verified() -> None:
    variables = accepted(a_bundle(environment={"NOTE": "it's"})).variables
    assert environment_file(variables) == clusterenv.render(variables).encode()
