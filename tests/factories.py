"""Valid by default: a test names only what is different about its bundle.

verify(a_bundle(token=CLUSTER.token(audience="somebody-else")), MOMENT, resolves=nothing)
"""

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import PurePosixPath
from typing import Any

from lab.cluster import Authority, Cluster, Release, now
from vmmesh_agent.bundle import Bundle, Package, Sidecar, Workload
from vmmesh_agent.config import Config, Endpoint, SidecarSettings
from vmmesh_agent.health import Condition, Health, Severity, State
from vmmesh_agent.report import Known, Report
from vmmesh_agent.units import UnitState
from vmmesh_agent.verify import VerifiedBundle, verify

STRANGER = Authority.create("somebody else")
MOMENT = now()
CLUSTER = replace(Cluster.create(), moment=MOMENT)  # its tokens are of the moment at which they are judged
EVENING = datetime(2026, 3, 4, 20, 15, 30, tzinfo=UTC)
CONFIG_FILE = PurePosixPath("/etc/vmmesh-agent/config.yaml")
DEMO = Workload("vm", "demo")

# The example that release 1.12 prints: the order of the lines, the keys and the shape of the values are istioctl's.
CLUSTER_ENV_1_12 = """\
CANONICAL_REVISION='latest'
CANONICAL_SERVICE='orders'
ISTIO_INBOUND_PORTS='*'
ISTIO_LOCAL_EXCLUDE_PORTS='15090,15021,15020'
ISTIO_METAJSON_LABELS='{"app":"orders","service.istio.io/canonical-name":"orders","service.istio.io/canonical-revision":"latest"}'
ISTIO_META_CLUSTER_ID='Kubernetes'
ISTIO_META_DNS_CAPTURE='true'
ISTIO_META_MESH_ID='mesh7'
ISTIO_META_NETWORK=''
ISTIO_META_WORKLOAD_NAME='orders'
ISTIO_NAMESPACE='shop'
ISTIO_SERVICE='orders.shop'
ISTIO_SERVICE_CIDR='*'
POD_NAMESPACE='shop'
SERVICE_ACCOUNT='orders'
TRUST_DOMAIN='cluster.local'
"""
_LABELS = '{"app":"orders","service.istio.io/canonical-name":"orders","service.istio.io/canonical-revision":"latest"}'
MESH_1_12 = f"""\
defaultConfig:
  discoveryAddress: istiod.istio-system.svc:15012
  meshId: mesh7
  proxyMetadata:
    CANONICAL_REVISION: latest
    CANONICAL_SERVICE: orders
    ISTIO_META_CLUSTER_ID: Kubernetes
    ISTIO_META_DNS_CAPTURE: "true"
    ISTIO_META_MESH_ID: mesh7
    ISTIO_META_NETWORK: ""
    ISTIO_META_WORKLOAD_NAME: orders
    ISTIO_METAJSON_LABELS: '{_LABELS}'
    POD_NAMESPACE: shop
    SERVICE_ACCOUNT: orders
    TRUST_DOMAIN: cluster.local
  tracing:
    zipkin:
      address: zipkin.istio-system:9411
"""


def a_bundle(
    *,
    token: str | None = None,
    address: str = "192.0.2.1",
    revision: str = "",
    as_of: Release = "newest",
    environment: Mapping[str, str | None] | None = None,
    workload: Workload | None = None,
    sidecar: Sidecar | None = None,
    **files: bytes | None,
) -> Bundle:
    """Return a sound bundle for vm/demo. `files` replace whole files (`hosts=b""`); None leaves one out."""
    replaced: dict[str, Any] = dict(files)
    contents = CLUSTER.bundle(
        token=token, address=address, revision=revision, as_of=as_of, environment=environment, **replaced
    )
    return Bundle(contents, workload, sidecar)


def the_example_of_1_12() -> Bundle:
    """Return the bundle of the oldest release that is known, byte for byte as that istioctl wrote it."""
    return a_bundle(
        token=CLUSTER.token(namespace="shop", service_account="orders"),
        cluster_env=CLUSTER_ENV_1_12.encode(),
        mesh_yaml=MESH_1_12.encode(),
        hosts=b"198.51.100.7 istiod.istio-system.svc\n",
    )


def nothing(_name: str) -> bool:
    """A resolver that finds no name."""
    return False


def anything(_name: str) -> bool:
    """A resolver that finds every name."""
    return True


def a_verified_bundle(bundle: Bundle | None = None, moment: datetime = MOMENT) -> VerifiedBundle:
    """Return what `verify` makes of a bundle that is sound."""
    return verify(bundle or a_bundle(), moment, resolves=nothing)


def a_package(**changes: Any) -> Package:
    """Return a package as a bundle names it."""
    usual: dict[str, Any] = {
        "format": "deb",
        "arch": "amd64",
        "url": "https://mesh.example.com/packages/istio-sidecar.deb",
        "sha256": "ab" * 32,
        "size": 4096,
    }
    return Package(**usual | changes)


def a_config(url: str = "file:///srv/bundle", *, sidecar: SidecarSettings | None = None, **endpoint: Any) -> Config:
    """Return a configuration that fetches from `url`; `endpoint` are further settings of the endpoint."""
    return Config(endpoint=Endpoint(url, **endpoint), sidecar=sidecar or SidecarSettings(), healthy_within=5.0)


def a_condition(code: str = "cert_expired", severity: Severity = Severity.FAILED, **changes: Any) -> Condition:
    """Return something that is wrong."""
    usual: dict[str, Any] = {"message": "The certificate has expired.", "remedy": "Have a new token made."}
    return Condition(code, severity, **usual | changes)


def a_unit(active: str = "active", sub: str = "running", **changes: Any) -> UnitState:
    """Return what systemd says of istio.service."""
    usual: dict[str, Any] = {"is_loaded": True, "main_pid": 4711, "restarts": 0, "invocation": "0c" * 16}
    return UnitState(active=active, sub=sub, **usual | changes)


def a_report(state: State = State.HEALTHY, *conditions: Condition, **changes: Any) -> Report:
    """Return a full record of vm/demo, as the daemon saves it."""
    cause = conditions[0].code if conditions else "none"
    usual: dict[str, Any] = {
        "unit": a_unit(),
        "updated_at": EVENING,
        "known": Known("vm/demo", EVENING + timedelta(minutes=52, seconds=7), "1.28.2"),
        "certificate_not_after": EVENING + timedelta(hours=23, minutes=4),
        "by_daemon": True,
    }
    return Report(Health(state, cause, conditions), **usual | changes)
