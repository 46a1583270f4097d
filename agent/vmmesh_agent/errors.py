"""Every error the agent raises on purpose.

    AgentError                 what happened, what to do, a stable code, an exit status, can a retry help?
    ├── UsageError             the command line makes no sense                                   64
    ├── NotPermittedError      needs root                                                        77
    ├── ConfigurationError     /etc/vmmesh-agent is wrong; the daemon ends with this one only    78
    ├── FetchError             the endpoint was not reached, or it refused
    ├── BundleRefusedError     the bundle may not be trusted; carries every problem
    ├── InstallError           the sidecar package could not be installed
    ├── PlaceError             a file could not be put where it belongs
    └── HostError              the machine itself: a command failed, no space, a read-only disk

A bug is not in this tree: it ends the process with a traceback.
"""


class AgentError(Exception):
    """Something the agent can explain.

    `code` is kebab-case and stable; `hint` says what to do, or is empty where `message` says it all.
    """

    exit_status = 1

    def __init__(self, message: str, *, code: str, hint: str = "", retry: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.hint = hint
        self.retry = retry


class UsageError(AgentError):
    """The command line makes no sense."""

    exit_status = 64


class NotPermittedError(AgentError):
    """The command needs rights that this user does not have."""

    exit_status = 77


class ConfigurationError(AgentError):
    """The configuration is wrong; trying again cannot help."""

    exit_status = 78


class FetchError(AgentError):
    """The endpoint was not reached, or it refused. `retry_after` is for how many seconds it wants to be left alone."""

    retry_after = 0.0


class InstallError(AgentError):
    """The sidecar package could not be installed."""


class PlaceError(AgentError):
    """A file could not be put where it belongs."""


class HostError(AgentError):
    """The machine itself failed: a command, the disk, a permission."""
