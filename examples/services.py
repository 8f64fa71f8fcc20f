"""Services: an HTTP service that is launched once, found again, and told when its description has changed. Then it is stopped.

python examples/services.py [HOST]
"""

import json
import subprocess
import sys
import tempfile
import textwrap
import urllib.request
from pathlib import Path

from zerodeploy import ServiceError
from zerodeploy.services import run

# any program that keeps the protocol: find a port, listen, then write "running" and the port into the status file
SERVICE = """
import http.server, json, os, sys

path, root = sys.argv[1:3]
handler = lambda *args: http.server.SimpleHTTPRequestHandler(*args, directory=root)
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
state = json.load(open(path))
state.update(status="running", port=server.server_address[1])
json.dump(state, open(path + ".new", "w"))
os.replace(path + ".new", path)
server.serve_forever()
"""


def main(host: str | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "files.yaml"
        config.write_text(
            textwrap.dedent(f"""
                workdir: {folder}/data
                key: 'example-{{workdir.strip("/").replace("/", "--")}}'
                command: python3 -c {{code}} {{status_file}} {{workdir}}
                code: {json.dumps(SERVICE)}
                handshake: /
                restart: on-failure
                log: {{max_bytes: 1000000}}
            """)
            + (f"hostname: {host}\ntunnel: true\n" if host else "")
        )
        service = run(config)  # launched, on the host if there is one, with nothing installed there
        print("answers at", service["hostname"], service["port"])
        with urllib.request.urlopen(f"http://{service['hostname']}:{service['port']}/") as page:
            print("status", page.status)
        print("the same again:", run(config) == service)  # found by its connection file: no login, no second process
        config.write_text(config.read_text().replace("1000000", "2000000"))
        print("differs now:", run(config)["drift"])
        command = [sys.executable, "-m", "zerodeploy", "service"]
        where = [host] if host else []
        subprocess.run([*command, "ps", *where], check=True)
        key = "example-" + f"{folder}/data".strip("/").replace("/", "--")
        for what in ("stop", "rm"):
            subprocess.run([*command, what, *where, key], check=True)
        try:
            run({"workdir": folder, "key": key, "command": "sh -c 'echo no port is free; exit 1'"})
        except ServiceError as error:
            print("an error shows the log:", error)
        subprocess.run([*command, "rm", key], check=True)


if __name__ == "__main__":
    main(*sys.argv[1:] or [None])
