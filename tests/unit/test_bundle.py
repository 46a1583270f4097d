"""The four forms of a bundle, told apart by their content; and what calls itself one and is none."""

import base64
import gzip
import io
import json
import tarfile
from typing import Any

import pytest

from factories import a_bundle, a_package
from lab.cluster import as_json, as_secret, as_tar
from vmmesh_agent.bundle import (
    FILES,
    MAX_BYTES,
    Bundle,
    BundleRefusedError,
    Package,
    Problem,
    Sidecar,
    Workload,
    unpack,
)

CONTENTS = dict(a_bundle().files)


def refusal(data: bytes) -> BundleRefusedError:
    with pytest.raises(BundleRefusedError) as caught:
        unpack(data)
    assert len(caught.value.message) < 600
    assert all(problem.message.isprintable() for problem in caught.value.problems)
    return caught.value


def tar(*entries: tuple[tarfile.TarInfo, bytes], form: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for entry, content in entries:
            entry.size = len(content) if entry.isreg() else 0
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def entry(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def document(**changes: Any) -> bytes:
    usual = {"version": 1, "files": {name: content.decode() for name, content in CONTENTS.items()}}
    return json.dumps(usual | changes).encode()


# --- the forms ---


@pytest.mark.parametrize(
    "data",
    [
        as_json(CONTENTS),
        b"\n  " + as_json(CONTENTS),
        as_secret(CONTENTS),
        as_tar(CONTENTS),
        as_tar(CONTENTS, gz=False),
        as_tar(CONTENTS, folder="demo"),
        as_tar({f"./{name}": content for name, content in CONTENTS.items()}),
        tar(*((entry(name), content) for name, content in CONTENTS.items()), form=tarfile.PAX_FORMAT),
        tar(*((entry(name), content) for name, content in CONTENTS.items()), form=tarfile.USTAR_FORMAT),
    ],
    ids="json spaced secret tar.gz tar folder dot pax ustar".split(),
)
def test_a_form_is_told_by_its_content(data: bytes) -> None:
    assert unpack(data).files == CONTENTS


def test_json_carries_the_workload_and_the_sidecar_too() -> None:
    packages = [a_package().as_dict() | {"sha256": "sha256:" + "AB" * 32}, a_package(size=None).as_dict()]
    read = unpack(as_json(CONTENTS, {"version": "1.28.2", "packages": packages}, namespace="shop", name="orders"))
    assert read.workload == Workload("shop", "orders")
    assert read.sidecar == Sidecar("1.28.2", (a_package(), a_package(size=None)))


def test_unknown_keys_are_kept_out_of_the_way() -> None:
    data = as_json(CONTENTS | {"notes.txt": b"x"}, {"version": "1", "channel": "stable"}, generation=7)
    assert unpack(data) == Bundle(CONTENTS, Workload("vm", "demo"), Sidecar("1"))


def test_a_bundle_survives_its_own_json() -> None:
    bundle = a_bundle(workload=Workload("vm", "demo"), sidecar=Sidecar("1", (a_package(), a_package(size=None))))
    assert unpack(json.dumps(bundle.as_json()).encode()) == bundle


def test_bytes_that_are_no_text_survive_too_so_that_verify_can_name_the_file() -> None:
    bundle = Bundle({**CONTENTS, "mesh.yaml": b"\xff\x00\xfe"})
    assert unpack(json.dumps(bundle.as_json()).encode()) == bundle
    assert unpack(as_tar(dict(bundle.files))) == bundle


def test_missing_files_are_verifys_to_say() -> None:
    assert unpack(document(files={})).files == {}
    assert unpack(as_tar({"hosts": b""})).files == {"hosts": b""}


def test_other_files_in_an_archive_are_left_alone() -> None:
    more = {"README": b"x", "packages/istio-sidecar.deb": b"x", "deep/er/hosts": b"x", **CONTENTS}
    assert unpack(as_tar(more)).files == CONTENTS


def test_a_bundle_shows_no_content() -> None:
    assert "eyJ" not in repr(a_bundle())


# --- what is none ---


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "bundle-unknown-format"),
        (b"<!DOCTYPE html><title>Log in</title>", "bundle-unknown-format"),
        (b"PK\x03\x04", "bundle-unknown-format"),
        (b"\x1b[2J\x00", "bundle-unknown-format"),
        (b"[]", "bundle-unknown-format"),
        (b"{", "bundle-malformed"),
        (b"{}", "bundle-unknown-version"),
        (b'{"version": 1}', "bundle-malformed"),
        (b'{"version": ' + b"1" * 5000 + b"}", "bundle-malformed"),
        (b'{"a":' * 50_000, "bundle-malformed"),
        (b'{"version": 1, "version": 1}', "bundle-malformed"),
        (b'{"version": "\xff"}', "bundle-malformed"),
        (document(version=2), "bundle-unknown-version"),
        (document(version="1"), "bundle-unknown-version"),
        (document(version=True), "bundle-unknown-version"),
        (document(version="\x1b[2J" * 5000), "bundle-unknown-version"),
        (document(files=[]), "bundle-malformed"),
        (document(files={"hosts": 7}), "bundle-malformed"),
        (document(files={"hosts": None}), "bundle-malformed"),
        (document(files={"hosts": "\ud800"}), "bundle-malformed"),
        (document(workload="vm/demo"), "bundle-malformed"),
        (document(workload={"namespace": "vm"}), "bundle-malformed"),
        (document(workload={"namespace": "vm", "name": 7}), "bundle-malformed"),
        (document(sidecar=[]), "bundle-malformed"),
        (document(sidecar={"version": 1.28}), "bundle-malformed"),
        (document(sidecar={"packages": {}}), "bundle-malformed"),
        (document(sidecar={"packages": ["a.rpm"]}), "bundle-malformed"),
        (document(sidecar={"packages": [{}]}), "bundle-malformed"),
        (document(sidecar={"packages": [a_package(size=-1).as_dict()]}), "bundle-malformed"),
        (document(sidecar={"packages": [a_package(size=True).as_dict()]}), "bundle-malformed"),
        (document(sidecar={"packages": [a_package(size="4k").as_dict()]}), "bundle-malformed"),
        (b'{"kind": "ConfigMap", "data": {}}', "bundle-unknown-format"),
        (b'{"kind": ["Secret"]}', "bundle-unknown-format"),
        (b'{"kind": "Secret"}', "bundle-malformed"),
        (b'{"kind": "Secret", "data": {"hosts": "?"}}', "bundle-malformed"),
        (b'{"kind": "Secret", "data": {"hosts": "aGFs bG8="}}', "bundle-malformed"),
        (b'{"kind": "Secret", "data": {"hosts": "\\u00e9"}}', "bundle-malformed"),
        (b'{"kind": "Secret", "data": {"hosts": 7}}', "bundle-malformed"),
        (b" " * (MAX_BYTES + 1), "bundle-too-large"),
        (b"\x1f\x8b", "bundle-truncated"),
        (b"\x1f\x8bhello", "bundle-malformed"),
        (as_tar(CONTENTS)[:-9], "bundle-truncated"),
        (gzip.compress(b"")[:10] + b"\xff" * 50, "bundle-malformed"),
        (gzip.compress(b"no tar"), "bundle-truncated"),
        (gzip.compress(bytes(MAX_BYTES + 1)), "bundle-too-large"),
        (as_tar(CONTENTS, gz=False)[:1300], "bundle-truncated"),
        (tar((entry("hosts"), b""), (entry("hosts"), b"")), "bundle-ambiguous"),
        (tar((entry("a/hosts"), b""), (entry("b/mesh.yaml"), b"")), "bundle-ambiguous"),
        (tar((entry("hosts"), b""), (entry("a/mesh.yaml"), b"")), "bundle-ambiguous"),
        (tar((entry("/etc/hosts"), b"")), "bundle-hostile-archive"),
        (tar((entry("../hosts"), b"")), "bundle-hostile-archive"),
        (tar((entry("a/../../hosts"), b"")), "bundle-hostile-archive"),
        (tar((entry("../notes"), b"")), "bundle-hostile-archive"),
        (tar((entry("hosts", tarfile.SYMTYPE, "/etc/shadow"), b"")), "bundle-hostile-archive"),
        (tar((entry("hosts", tarfile.LNKTYPE, "mesh.yaml"), b"")), "bundle-hostile-archive"),
        (tar((entry("other", tarfile.SYMTYPE, "hosts"), b"")), "bundle-hostile-archive"),
        (tar((entry("hosts", tarfile.FIFOTYPE), b"")), "bundle-hostile-archive"),
        (tar((entry("hosts", tarfile.CHRTYPE), b"")), "bundle-hostile-archive"),
        (tar((entry("../" + "\x1b[2J" * 60), b"")), "bundle-hostile-archive"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # the bytes have random keys in them
)
def test_what_cannot_be_read_as_a_bundle_is_refused_with(data: bytes, code: str) -> None:
    error = refusal(data)
    assert error.code == code
    assert error.exit_status == 1
    assert error.hint


def test_nothing_is_told_as_nothing() -> None:
    assert refusal(b"").message == "the bundle was refused: it is empty"


def test_a_sparse_entry_claims_more_than_it_holds_and_is_refused() -> None:
    """An old GNU sparse header: 512 bytes in the archive, gigabytes when read."""
    plain = bytearray(tar((entry("hosts"), b"x" * 512)))
    plain[156:157] = tarfile.GNUTYPE_SPARSE
    plain[386:398] = b"00000000000\0"  # where the only piece begins
    plain[398:410] = b"00000001000\0"  # and its length
    plain[483:495] = b"77777777777\0"  # the size that it claims: 8 GiB
    plain[148:156] = b" " * 8
    plain[148:156] = f"{sum(plain[:512]):06o}\0 ".encode()
    assert refusal(bytes(plain)).code == "bundle-too-large"


def test_a_damaged_archive_is_refused_or_read_but_never_a_crash() -> None:
    whole = as_tar(CONTENTS, gz=False)
    for position in range(0, len(whole), 37):
        damaged = whole[:position] + bytes([whole[position] ^ 0x41]) + whole[position + 1 :]
        try:
            assert set(unpack(damaged).files) <= set(FILES)
        except BundleRefusedError as error:
            assert error.code.startswith("bundle-")  # noqa: PT017  # most are read, some are refused


def test_a_refusal_of_one_kind_has_its_code_and_of_several_lists_them() -> None:
    one, other = (
        Problem("a-code", "hosts", "it is wrong", "mend it"),
        Problem("b-code", "", "it is wrong too", "mend it"),
    )
    assert (BundleRefusedError(one).code, BundleRefusedError(one).hint) == ("a-code", "mend it")
    both = BundleRefusedError(one, other)
    assert both.code == "bundle-refused"
    assert both.hint == "mend it"
    assert BundleRefusedError(one, one).code == "a-code"
    assert both.message.splitlines()[1:] == ["  hosts: it is wrong [a-code]", "  it is wrong too [b-code]"]


def test_a_secret_holds_its_files_in_base64() -> None:
    data = {
        "kind": "Secret",
        "data": {name: base64.b64encode(CONTENTS[name]).decode() for name in ("hosts", "mesh.yaml")},
    }
    assert set(unpack(json.dumps(data).encode()).files) == {"hosts", "mesh.yaml"}


def test_a_package_is_what_the_bundle_says() -> None:
    assert Package(**a_package().as_dict()) == a_package()
