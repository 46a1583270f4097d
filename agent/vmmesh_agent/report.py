"""The status record: saved by whoever watches the sidecar, shown by `status`.

It is world-readable and holds no secret: times and names only.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Any

from vmmesh_agent.errors import AgentError
from vmmesh_agent.health import Condition, Health, Severity, State, worst_first
from vmmesh_agent.host import ROOT, Host
from vmmesh_agent.units import UnitState

SCHEMA = "vmmesh.status/v1"
FILE = PurePosixPath("/run/vmmesh-agent/status.json")
FRESH_SECONDS = 60  # the daemon writes at least twice in this time


@dataclass(frozen=True, slots=True)
class Known:
    """What joining told.

    The WorkloadGroup (`namespace/name`), when the token expires, the installed version, istiod's host name and the
    addresses that the bundle gives it, and the endpoint's clock less ours in seconds.
    """

    workload: str = ""
    token_expires_at: datetime | None = None
    sidecar_version: str = ""
    istiod: str = ""
    istiod_addresses: tuple[str, ...] = ()
    clock_offset: float | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """All that `status` shows. Times are aware and in UTC; what is not known is None or empty."""

    health: Health
    unit: UnitState
    updated_at: datetime
    known: Known = Known()
    certificate_not_after: datetime | None = None
    unseen: tuple[str, ...] = ()
    by_daemon: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return the record in its JSON form, `vmmesh.status/v1`."""
        namespace, _, name = self.known.workload.partition("/")
        return {
            "schema": SCHEMA,
            **health_as_dict(self.health),
            "workload": {"namespace": namespace, "name": name} if self.known.workload else {},
            "bundle": {"token_expires_at": _written(self.known.token_expires_at)},
            "istiod": {"name": self.known.istiod, "addresses": list(self.known.istiod_addresses)},
            "clock_offset_seconds": self.known.clock_offset,
            "certificate": {"not_after": _written(self.certificate_not_after)},
            "sidecar": {"version": self.known.sidecar_version or None, "unit": asdict(self.unit)},
            "unseen": list(self.unseen),
            "daemon": self.by_daemon,
            "updated_at": _written(self.updated_at),
        }


def health_as_dict(health: Health) -> dict[str, Any]:
    """Return state, cause and conditions in their JSON form, as `status` and `explain` print them."""
    return {
        "state": str(health.state),
        "cause": health.cause,
        "conditions": [
            {
                "code": condition.code,
                "severity": str(condition.severity),
                "message": condition.message,
                "remedy": condition.remedy,
                "evidence": condition.evidence,
                "since": _written(condition.since),
            }
            for condition in health.conditions
        ],
    }


def from_dict(document: Mapping[str, Any]) -> Report:
    """Read the JSON form. Raise KeyError, TypeError or ValueError where it is none."""
    workload = document["workload"]
    sidecar = document["sidecar"]
    updated_at = _read_time(document["updated_at"])
    if document["schema"] != SCHEMA or updated_at is None:
        raise ValueError("not a status record")
    return Report(
        health=Health(State(document["state"]), str(document["cause"]), tuple(_conditions(document["conditions"]))),
        unit=UnitState(**sidecar["unit"]),
        updated_at=updated_at,
        known=Known(
            workload=f"{workload['namespace']}/{workload['name']}" if workload else "",
            token_expires_at=_read_time(document["bundle"]["token_expires_at"]),
            sidecar_version=str(sidecar["version"] or ""),
            istiod=str(document["istiod"]["name"]),
            istiod_addresses=tuple(map(str, document["istiod"]["addresses"])),
            clock_offset=document["clock_offset_seconds"],
        ),
        certificate_not_after=_read_time(document["certificate"]["not_after"]),
        unseen=tuple(map(str, document["unseen"])),
        by_daemon=bool(document["daemon"]),
    )


def load(host: Host) -> Report | None:
    """Return the last record, None where there is none or it cannot be read."""
    content = host.read(FILE)
    try:
        return from_dict(json.loads(content)) if content else None
    except (ValueError, KeyError, TypeError):
        return None


def save(host: Host, report: Report) -> None:
    """Keep the record where every user may read it."""
    host.make_folder(FILE.parent, ROOT, 0o755)
    host.write(FILE, json.dumps(report.as_dict(), indent=1).encode() + b"\n", ROOT, 0o644)


def with_trouble(health: Health, trouble: AgentError | None, moment: datetime) -> Health:
    """Add what keeps the agent from its work. A sidecar that serves goes on serving: degraded, not failed."""
    if trouble is None:
        return health
    serves = health.state in {State.HEALTHY, State.DEGRADED}
    condition = Condition(
        code=trouble.code.replace("-", "_"),
        severity=Severity.DEGRADED if serves else Severity.FAILED,
        message=trouble.message,
        remedy=trouble.hint,
        since=moment,
    )
    others = (other for other in health.conditions if other.code != condition.code)
    conditions = worst_first((condition, *others))
    state = State.DEGRADED if serves else State.FAILED if health.state is State.UNKNOWN else health.state
    return Health(state, conditions[0].code, conditions)


def keeping_since(health: Health, before: Health | None, moment: datetime) -> Health:
    """Fill in when each condition began: it keeps its time for as long as it lasts, over restarts of the daemon."""
    known = {condition.code: condition.since for condition in before.conditions} if before else {}
    return replace(
        health,
        conditions=tuple(
            replace(condition, since=known.get(condition.code) or condition.since or moment)
            for condition in health.conditions
        ),
    )


def _conditions(documents: list[Mapping[str, Any]]) -> Iterator[Condition]:
    for document in documents:
        yield Condition(
            code=str(document["code"]),
            severity=Severity[str(document["severity"]).upper()],
            message=str(document["message"]),
            remedy=str(document["remedy"]),
            evidence=str(document["evidence"]),
            since=_read_time(document["since"]),
        )


def _written(moment: datetime | None) -> str | None:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ") if moment else None


def _read_time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None
