"""The endpoint's identity: made once, pinned, renewed; or given."""

import hashlib
import re
import ssl
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from endpoint.serving import Running, Setup, error_of
from lab.cluster import Authority, now, private_pem


def openssl(*arguments: str | Path, given: bytes = b"") -> bytes:
    """What the openssl command says."""
    return subprocess.run(["openssl", *arguments], input=given, capture_output=True, check=True).stdout


def pin_by_openssl(pem: bytes) -> str:
    public = openssl("x509", "-pubkey", "-noout", given=pem)
    return "sha256:" + hashlib.sha256(openssl("pkey", "-pubin", "-outform", "der", given=public)).hexdigest()


def served_certificate(server: Running) -> x509.Certificate:
    with server.connect() as connection:
        der = connection.getpeercert(binary_form=True)
    assert der
    return x509.load_der_x509_certificate(der)


def issue_own(setup: Setup, *, remaining: timedelta) -> None:
    """Put a server certificate with so much time left in place, signed by the endpoint's own authority."""
    key = serialization.load_pem_private_key((setup.state / "ca.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    ca_pem = (setup.state / "ca.pem").read_bytes()
    authority = Authority(x509.load_pem_x509_certificate(ca_pem), key)
    served = x509.load_pem_x509_certificates((setup.state / "server.pem").read_bytes())[0]
    names = served.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    new = ec.generate_private_key(ec.SECP256R1())
    leaf = authority.issue(
        new.public_key(), list(names), not_before=now() - timedelta(days=60), not_after=now() + remaining
    )
    aside = setup.state / "aside"
    aside.write_bytes(private_pem(new) + leaf + ca_pem)
    aside.rename(setup.state / "server.pem")


def a_pair(setup: Setup, authority: Authority, *names: str, days: int = 5) -> tuple[Path, Path]:
    """A certificate with its chain and its key, as files."""
    leaf, key = setup.cluster.server_certificate(names, ca=authority, not_after=now() + timedelta(days=days))
    paths = setup.folder / "given.pem", setup.folder / "given.key"
    paths[0].write_bytes(leaf + authority.pem)
    paths[1].write_bytes(key)
    return paths


def test_the_pin_is_that_of_the_authority_and_the_chain_that_is_sent_ends_in_it(setup: Setup) -> None:
    setup.token()
    with setup.serving() as server:
        address = f"127.0.0.1:{server.port}"
        sent = openssl("s_client", "-connect", address, "-showcerts").decode()
    chain = re.findall(r"-----BEGIN CERT.*?END CERTIFICATE-----\n", sent, re.DOTALL)
    expected = pin_by_openssl(chain[-1].encode())
    assert len(chain) == 2
    assert expected == pin_by_openssl((setup.state / "ca.pem").read_bytes())
    assert setup.run("pin", "--state-dir", setup.state).stdout == f"{expected}\n"
    assert f"\npin:    {expected}\n" in server.introduction
    assert f'\n  ca_pins: ["{expected}"]\n' in server.introduction
    assert "\nworkload_group: {namespace: vm, name: demo}\n" in server.introduction


def test_before_the_first_start_there_is_no_pin(setup: Setup) -> None:
    refused = setup.run("pin", "--state-dir", setup.state)
    assert (refused.returncode, refused.stdout) == (78, "")
    assert "serve" in refused.stderr


def test_keys_are_the_owners_alone_whatever_the_umask_and_the_state_was_before(setup: Setup) -> None:
    setup.state.mkdir(mode=0o755)
    setup.token()
    with setup.serving():
        modes = {path.name: path.stat().st_mode & 0o777 for path in setup.state.iterdir()}
    assert setup.state.stat().st_mode & 0o777 == 0o700
    assert modes.pop("ca.pem") == 0o644
    assert {"ca.key", "server.pem", "credentials.json"} <= set(modes)
    assert set(modes.values()) == {0o600}


def test_no_key_is_readable_by_others_even_while_it_is_written(setup: Setup) -> None:
    setup.token()
    trace = setup.folder / "trace"
    command: list[str | Path] = [
        "strace",
        "-D",
        "-f",
        "-e",
        "trace=open,openat,creat,chmod,fchmod,fchmodat",
        "-o",
        trace,
    ]
    with setup.serving(through=command):
        pass
    made = re.findall(r'openat\(.*"([^"]*state/[^"]*)", ([A-Z_|]*O_CREAT[A-Z_|]*), (0\d+)\)', trace.read_text())
    keys = [entry for entry in made if ".lock" not in entry[0]]
    assert {re.sub(r"\.[0-9a-f]{16}$", "", Path(path).name) for path, _, _ in keys} >= {".ca.key", ".server.pem"}
    assert all("O_EXCL" in flags and mode == "0600" for _, flags, mode in keys)


def test_a_certificate_that_is_due_is_renewed_while_serving_and_the_authority_stays(setup: Setup) -> None:
    token = setup.token()
    with setup.serving() as server:
        first = served_certificate(server)
        pin = setup.run("pin", "--state-dir", setup.state).stdout
        issue_own(setup, remaining=timedelta(days=29))
        renewed = served_certificate(server)
        assert renewed.not_valid_after_utc > now() + timedelta(days=60)
        assert renewed.serial_number != first.serial_number
        assert server.get(token=token).status_code == 200
        assert setup.run("pin", "--state-dir", setup.state).stdout == pin


def test_a_certificate_that_is_not_due_stays(setup: Setup) -> None:
    setup.token()
    with setup.serving() as server:
        issue_own(setup, remaining=timedelta(days=31))
        put = x509.load_pem_x509_certificates((setup.state / "server.pem").read_bytes())[0]
        assert served_certificate(server).serial_number == put.serial_number
    with setup.serving() as server:
        assert served_certificate(server).serial_number == put.serial_number


def test_other_names_make_another_certificate_of_the_same_authority(setup: Setup) -> None:
    setup.token()
    with setup.serving() as server:
        old, ca = served_certificate(server), (setup.state / "ca.pem").read_bytes()
    with setup.serving("--name", "mesh.example.com", "--name", "127.0.0.1") as server:
        assert f"bundle: https://mesh.example.com:{server.port}/v1/bundle" in server.introduction
        new = served_certificate(server)
    assert new.serial_number != old.serial_number
    names = new.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["mesh.example.com"]
    assert (setup.state / "ca.pem").read_bytes() == ca


def test_a_lost_certificate_of_the_authority_is_made_anew_with_the_same_pin(setup: Setup) -> None:
    setup.token()
    with setup.serving():
        pin = setup.run("pin", "--state-dir", setup.state).stdout
    (setup.state / "ca.pem").unlink()
    with setup.serving() as server:
        served_certificate(server)
        assert setup.run("pin", "--state-dir", setup.state).stdout == pin


def test_servers_that_start_at_once_on_an_empty_state_make_one_authority(setup: Setup) -> None:
    token = setup.token("--machines", "4")

    def start(number: int) -> tuple[int, str]:
        with setup.serving() as server:
            introduced = re.search(r"^pin:    (\S+)$", server.introduction, re.MULTILINE)
            assert introduced
            return server.get(token=token, machine=f"{number:x}").status_code, introduced[1]

    with ThreadPoolExecutor(4) as pool:
        outcomes = set(pool.map(start, range(4)))
    assert {status for status, _ in outcomes} == {200}
    assert len(outcomes) == 1


def test_tls_before_1_2_is_refused_by_the_server(setup: Setup) -> None:
    setup.token()
    with setup.serving() as server:
        command = ["openssl", "s_client", "-connect", f"127.0.0.1:{server.port}", "-cipher", "DEFAULT@SECLEVEL=0"]
        refused = subprocess.run([*command, "-tls1_1"], input=b"", capture_output=True, check=False)
        accepted = subprocess.run([*command, "-tls1_2"], input=b"", capture_output=True, check=False)
    assert (accepted.returncode, refused.returncode) == (0, 1)
    assert b"unexpected eof" in refused.stderr  # asyncio closes instead of sending the alert


def test_a_certificate_that_is_given_is_served_and_its_replacement_too(setup: Setup) -> None:
    token, authority = setup.token(), Authority.create("example.com")
    ca_file = setup.folder / "given-ca.pem"
    ca_file.write_bytes(authority.pem)
    certificate, key = a_pair(setup, authority, "127.0.0.1")
    options = ("--certificate", certificate, "--key", key)
    with setup.serving(*options, ca_file=ca_file) as server:
        assert server.get(token=token).status_code == 200
        assert not (setup.state / "ca.key").exists()
        printed = setup.run("pin", "--certificate", certificate).stdout
        assert printed == f"{pin_by_openssl(authority.pem)}\n"
        first, old_key = served_certificate(server), key.read_bytes()
        a_pair(setup, authority, "127.0.0.1", days=9)
        new_key = key.read_bytes()
        key.write_bytes(old_key)  # the certificate is there, its key not yet
        assert served_certificate(server).serial_number == first.serial_number
        assert "certificate not renewed, the former one stays" in server.log()
        key.write_bytes(new_key)
        assert served_certificate(server).not_valid_after_utc > now() + timedelta(days=8)


def test_a_key_of_another_certificate_or_with_a_passphrase_is_refused_at_the_start(setup: Setup) -> None:
    setup.token()
    certificate, key = a_pair(setup, Authority.create(), "127.0.0.1")
    other = setup.folder / "other.key"
    loaded = serialization.load_pem_private_key(key.read_bytes(), None)
    encrypted = loaded.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"x")
    )
    for content in (private_pem(ec.generate_private_key(ec.SECP256R1())), encrypted, b"nothing"):
        other.write_bytes(content)
        refused = setup.run(
            *("serve", "--bundle-dir", setup.bundle_dir, "--state-dir", setup.state),
            *("--certificate", certificate, "--key", other),
        )
        assert (refused.returncode, refused.stdout) == (78, "")
        assert "Traceback" not in refused.stderr


def test_a_client_certificate_is_a_credential_where_its_authority_is_named(setup: Setup) -> None:
    authority = Authority.create("machines")
    ca_file = setup.folder / "client-ca.pem"
    ca_file.write_bytes(authority.pem)
    certificate = a_pair(setup, authority, "vm-17")
    stranger_folder = Setup(setup.folder / "stranger")
    stranger = a_pair(stranger_folder, Authority.create("somebody"), "vm-18")
    with setup.serving("--client-ca", ca_file) as server:
        assert server.get(certificate=certificate).status_code == 200
        assert answer_to(server, certificate).startswith(b"HTTP/1.1 200 ")
        assert server.requests(2)[0]["credential"] == "certificate commonName=vm-17"
        assert error_of(server.get()) == (401, "credential-missing")
        assert error_of(server.get(certificate=certificate, token="wrong")) == (401, "credential-unknown")
        assert answer_to(server, stranger) == b""


def answer_to(server: Running, certificate: tuple[Path, Path]) -> bytes:
    """What comes back over a raw connection: with TLS 1.3 the client learns of a refusal when it reads."""
    context = ssl.create_default_context(cafile=server.ca_file)
    context.load_cert_chain(*certificate)
    with (
        suppress(OSError),
        context.wrap_socket(server.dial(), server_hostname="127.0.0.1") as connection,
    ):
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        return connection.recv(100)
    return b""
