"""cloud-init: is it still at work on this machine, and what went wrong with it? Told by its own files.

Its generator writes `enabled` or `disabled` before any unit starts; its last stage writes result.json, which its first
stage, or the loss of /run, takes away at the next boot. `cloud-init status` judges by the same files
(cloudinit/cmd/status.py, https://cloudinit.readthedocs.io/en/latest/howto/status.html).

No unit of ours is ordered after cloud-init's: user-data that starts the agent, or installs its package, is run by
cloud-final.service, which then waits for the agent; so the agent waits for cloud-init only when it is up
(https://github.com/canonical/cloud-init/issues/2662, https://github.com/canonical/ubuntu-pro-client/pull/2937).
"""

import json
from pathlib import PurePosixPath

from vmmesh_agent.errors import AgentError
from vmmesh_agent.host import Host
from vmmesh_agent.text import printable

_RUN = PurePosixPath("/run/cloud-init")
_STATUS = PurePosixPath("/var/lib/cloud/data/status.json")  # what the link of this name in /run leads to
_MAX_BYTES = 1024**2


def is_at_work(host: Host) -> bool:
    """Will cloud-init still do something in this boot? Never where it is disabled, or not there."""
    there = {name for name in ("disabled", "enabled", "result.json", "status.json") if host.status(_RUN / name)}
    return bool(there & {"enabled", "status.json"}) and not there & {"disabled", "result.json"}


def complaint(host: Host) -> str:
    """Return a line with the errors that cloud-init had in this boot, empty where it had none."""
    try:
        stages = json.loads((host.read(_STATUS, _MAX_BYTES) if host.status(_RUN / "status.json") else b"") or b"{}")
        errors = [str(error) for stage in stages["v1"].values() if isinstance(stage, dict) for error in stage["errors"]]
    except (AgentError, ValueError, KeyError, TypeError, AttributeError):  # not ours, and only a help
        return ""
    return f"cloud-init had errors, see `cloud-init status --long`: {printable('; '.join(errors))}" if errors else ""
