"""An HTTP server that reads whatever is posted to it and keeps nothing.

It prints its address, and ends when its standard input closes.
"""

import http.server
import os
import sys
import threading

BUFFER_BYTES = 1 << 20


class Handler(http.server.BaseHTTPRequestHandler):
    """Says yes to everything."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answer with an empty object."""
        self._answer()

    def do_POST(self) -> None:
        """Read the body into the same buffer again and again."""
        left = int(self.headers.get("Content-Length", 0))
        buffer = memoryview(bytearray(BUFFER_BYTES))
        while left:
            got = self.rfile.readinto(buffer[: min(left, BUFFER_BYTES)])
            if not got:
                break
            left -= got
        self._answer()

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def _answer(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")


def main() -> None:
    """Serve on loopback until standard input closes."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
