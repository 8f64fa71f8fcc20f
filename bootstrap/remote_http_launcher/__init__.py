"""For programs that say ``from remote_http_launcher import run``: the same as `zerodeploy.services.run`."""

from zerodeploy.errors import ServiceError as LauncherError
from zerodeploy.services import run

__all__ = ["LauncherError", "run"]
