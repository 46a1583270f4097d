"""Join tokens and shared secrets: made, used, used up, expired, revoked, and all of it at the same time."""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from endpoint.serving import COMMAND, Setup, error_of, eventually


def listed(setup: Setup) -> dict[str, list[str]]:
    """The rows of `token list` by id."""
    rows = setup.run("token", "list", "--state-dir", setup.state).stdout.splitlines()[1:]
    return {row.split()[0]: row.split() for row in rows}


def test_a_token_admits_as_many_machines_as_it_may_and_each_may_come_back(setup: Setup) -> None:
    token = setup.token("--machines", "2")
    with setup.serving() as server:
        assert server.get(token=token, machine="aa").status_code == 200
        assert server.get(token=token, machine="bb").status_code == 200
        assert error_of(server.get(token=token, machine="cc")) == (410, "token-used-up")
        assert server.get(token=token, machine="AA").status_code == 200
    with setup.serving() as server:  # it is kept, not only remembered
        assert error_of(server.get(token=token, machine="cc")) == (410, "token-used-up")
        assert server.get(token=token, machine="bb").status_code == 200


def test_after_expiry_only_machines_that_were_admitted_may_come_back(setup: Setup) -> None:
    token = setup.token("--machines", "2", "--expires", "8s")
    with setup.serving() as server:
        assert server.get(token=token, machine="aa").status_code == 200
        state = eventually(lambda: listed(setup)[token.split(".")[1]][4], lambda state: state == "expired")
        assert state == "expired"
        assert error_of(server.get(token=token, machine="bb")) == (410, "token-expired")
        assert server.get(token=token, machine="aa").status_code == 200


def test_a_revoked_token_admits_nobody_from_then_on(setup: Setup) -> None:
    token, other = setup.token("--machines", "2"), setup.token()
    with setup.serving() as server:
        assert server.get(token=token, machine="aa").status_code == 200
        assert setup.run("token", "revoke", token.split(".")[1], "--state-dir", setup.state).returncode == 0
        assert error_of(server.get(token=token, machine="aa")) == (410, "token-revoked")
        assert error_of(server.get(token=token, machine="bb")) == (410, "token-revoked")
        assert server.get(token=other).status_code == 200


def test_only_who_knows_the_secret_learns_that_a_token_was_revoked(setup: Setup) -> None:
    setup.token()
    token = setup.token()
    token_id = token.split(".")[1]
    setup.run("token", "revoke", token_id, "--state-dir", setup.state)
    with setup.serving() as server:
        assert error_of(server.get(token=f"VM1.{token_id}.{'0' * 64}")) == (401, "credential-unknown")


def test_a_token_made_while_serving_is_known_at_once(setup: Setup) -> None:
    setup.token()
    with setup.serving() as server:
        assert server.get(token=setup.token()).status_code == 200


@pytest.mark.parametrize(
    ("machine", "code"), [("", "machine-missing"), ("x y", "machine-invalid"), ("a" * 65, "machine-invalid")]
)
def test_a_join_token_without_a_sound_machine_admits_nobody(setup: Setup, machine: str, code: str) -> None:
    token = setup.token()
    with setup.serving() as server:
        assert error_of(server.get(token=token, machine=machine)) == (400, code)
    assert listed(setup)[token.split(".")[1]][3] == "0/1"


def test_machines_that_come_at_once_do_not_get_in_beyond_the_number(setup: Setup) -> None:
    token = setup.token("--machines", "5")
    with setup.serving() as server, ThreadPoolExecutor(12) as pool:
        machines = [f"{number:04x}" for number in range(12)]
        statuses = list(pool.map(lambda machine: server.get(token=token, machine=machine).status_code, machines))
    assert sorted(statuses) == [200] * 5 + [410] * 7
    assert listed(setup)[token.split(".")[1]][3] == "5/5"


def test_tokens_made_while_machines_are_admitted_are_neither_lost_nor_do_they_lose_a_machine(setup: Setup) -> None:
    token = setup.token("--machines", "20")
    with setup.serving() as server, ThreadPoolExecutor(6) as pool:
        made = [pool.submit(setup.token) for _ in range(8)]
        asked = [pool.submit(server.get, token=token, machine=f"{number:02x}") for number in range(20)]
        assert {answer.result().status_code for answer in asked} == {200}
        ids = {future.result().split(".")[1] for future in made}
    rows = listed(setup)
    assert set(rows) == ids | {token.split(".")[1]}
    assert rows[token.split(".")[1]][3] == "20/20"


def test_the_token_alone_is_printed_and_only_its_digest_is_kept(setup: Setup) -> None:
    made = setup.run("token", "create", "--state-dir", setup.state, "--comment", "rack 7", "--expires", "7d")
    prefix, token_id, secret = made.stdout.removesuffix("\n").split(".")
    assert (prefix, len(secret)) == ("VM1", 64)
    assert token_id in made.stderr
    kept = setup.state / "credentials.json"
    assert kept.stat().st_mode & 0o777 == 0o600
    listing = setup.run("token", "list", "--state-dir", setup.state)
    assert "rack 7" in listing.stdout
    for text in (kept.read_text(), listing.stdout, listing.stderr, made.stderr):
        assert secret not in text


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_what_root_writes_into_the_directory_of_another_user_is_that_users(setup: Setup) -> None:
    setup.state.mkdir(mode=0o700)
    os.chown(setup.state, 65534, 65534)
    setup.token()
    written = {path.name: path.stat() for path in setup.state.iterdir()}
    assert set(written) == {"credentials.json", "credentials.json.lock"}
    assert {(status.st_uid, status.st_gid, status.st_mode & 0o777) for status in written.values()} == {
        (65534, 65534, 0o600)
    }


def test_revoking_what_is_not_there_is_an_error(setup: Setup) -> None:
    revoked = setup.run("token", "revoke", "abcd", "--state-dir", setup.state)
    assert (revoked.returncode, "abcd" in revoked.stderr) == (64, True)


def test_a_file_of_tokens_that_cannot_be_read_admits_nobody(setup: Setup) -> None:
    token = setup.token()
    kept = setup.state / "credentials.json"
    sound = kept.read_bytes()
    with setup.serving() as server:
        assert server.get(token=token).status_code == 200
        kept.write_bytes(sound[:50])
        assert error_of(server.get(token=token)) == (503, "credentials-unreadable")
        kept.write_bytes(sound)
        kept.chmod(0o644)
        assert error_of(server.get(token=token)) == (503, "credentials-unreadable")
        kept.chmod(0o600)
        assert server.get(token=token).status_code == 200
    kept.write_text(json.dumps({"version": 2, "join_tokens": []}))
    refused = setup.run("serve", "--bundle-dir", setup.bundle_dir, "--state-dir", setup.state)
    assert refused.returncode == 78


def test_a_shared_secret_is_rotated_by_a_second_line(setup: Setup) -> None:
    old, new = "old-" + "0" * 32, "new-" + "1" * 32
    secrets = setup.folder / "secrets"
    secrets.touch(mode=0o600)
    secrets.write_text(f"{old}\n")
    with setup.serving("--shared-secret-file", secrets) as server:
        assert server.get(token=old, machine="").status_code == 200
        assert server.get(token=new, machine="").status_code == 401
        secrets.write_text(f"{old}\n{new}\n")
        answer = eventually(lambda: server.get(token=new), lambda answer: answer.status_code == 200)
        assert (answer.status_code, server.get(token=old).status_code) == (200, 200)
        secrets.write_text(f"{new}\n")
        answer = eventually(lambda: server.get(token=old), lambda answer: answer.status_code == 401)
        assert (answer.status_code, server.get(token=new).status_code) == (401, 200)
        assert old not in server.log()


@pytest.mark.parametrize(("content", "mode"), [("s" * 40, 0o644), ("s" * 40, 0o620), ("short", 0o600), ("", 0o600)])
def test_a_shared_secret_file_that_guards_nothing_is_refused_at_the_start(
    setup: Setup, content: str, mode: int
) -> None:
    secrets = setup.folder / "secrets"
    secrets.write_text(content)
    secrets.chmod(mode)
    refused = setup.run(
        "serve", "--bundle-dir", setup.bundle_dir, "--state-dir", setup.state, "--shared-secret-file", secrets
    )
    assert refused.returncode == 78
    assert str(secrets) in refused.stderr


def test_serving_without_any_credential_is_refused_and_says_what_to_do(setup: Setup) -> None:
    serve = ["serve", "--bundle-dir", str(setup.bundle_dir), "--state-dir", str(setup.state)]
    refused = setup.run(*serve)
    assert refused.returncode == 78
    assert "token create" in refused.stderr
    token = setup.token()
    setup.run("token", "revoke", token.split(".")[1], "--state-dir", setup.state)
    assert setup.run(*serve).returncode == 78


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["serve"],
        ["serve", "--bundle-dir", "/", "--listen", "everywhere"],
        ["serve", "--bundle-dir", "/", "--certificate", "x"],
        ["serve", "--bundle-dir", "/", "--dangerously-without-credentials"],
        ["token", "create", "--expires", "soon"],
        ["token", "create", "--machines", "0"],
        ["token", "create", "--workload", "demo"],
        ["token", "create", "--comment", "two\nlines"],
    ],
)
def test_a_command_line_that_makes_no_sense_is_a_usage_error(setup: Setup, arguments: list[str]) -> None:
    assert COMMAND.exists()
    refused = setup.run(*arguments)
    assert (refused.returncode, refused.stdout) == (64, "")
    assert "Traceback" not in refused.stderr
