"""The user-data examples of packaging/cloud-init, with what an administrator replaces in them."""

from lab.image import REPOSITORY
from system.joining import Mesh

EXAMPLES = REPOSITORY / "packaging/cloud-init"

PLACES = {
    "endpoint": "https://mesh.example.com:15443/v1/bundle",
    "pin": "sha256:0000000000000000000000000000000000000000000000000000000000000000",
    "token": "VM1.00000000.secret",
    "repository": "https://packages.example.com/deb",
    "rpm_repository": "https://packages.example.com/rpm",
    "key": "      -----BEGIN PGP PUBLIC KEY BLOCK-----\n      -----END PGP PUBLIC KEY BLOCK-----\n",
    "package": "https://packages.example.com/vmmesh-agent.deb",
    "digest": '"0000000000000000000000000000000000000000000000000000000000000000 ',
    "bundle": "H4sIAAAAAAAAAw==",
}


def example(name: str, **replaced: str) -> str:
    """Read an example; the keywords are those of `PLACES`."""
    text = (EXAMPLES / name).read_text()
    for key, value in replaced.items():
        assert text.count(PLACES[key]) == 1, key
        text = text.replace(PLACES[key], value)
    return text


def invitation(mesh: Mesh) -> dict[str, str]:
    """What is replaced for a machine that joins here, with a join token of its own."""
    return {"endpoint": mesh.endpoint.url, "pin": mesh.endpoint.pin, "token": mesh.endpoint.create_token()}
