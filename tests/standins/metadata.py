"""The stand-in metadata service of a cloud, as Amazon's second version: a session first, then the user-data.

python -m standins.metadata ADDRESS USER_DATA_FILE
"""

import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SESSION = "c2Vzc2lvbg=="
_LIFE, _SESSION = "X-aws-ec2-metadata-token-ttl-seconds", "X-aws-ec2-metadata-token"


class Metadata(BaseHTTPRequestHandler):
    """Answers one instance: 401 without a session, 404 where it was given nothing."""

    def do_PUT(self) -> None:
        """Open a session."""
        is_sound = self.path == "/latest/api/token" and self.headers.get(_LIFE, "").isdecimal()
        self._answer(200 if is_sound else 400, SESSION.encode())

    def do_GET(self) -> None:
        """Give out the user-data."""
        user_data = Path(sys.argv[2])
        if self.headers.get(_SESSION) != SESSION:
            self._answer(401)
        elif self.path != "/latest/user-data" or not user_data.exists():
            self._answer(404)
        else:
            self._answer(200, user_data.read_bytes())

    def _answer(self, status: int, body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    server = ThreadingHTTPServer((sys.argv[1], 80), Metadata)
    sys.stdout.write("listening\n")
    sys.stdout.flush()
    server.serve_forever()
