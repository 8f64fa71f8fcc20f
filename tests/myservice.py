"""An HTTP service that follows the status-file protocol, and breaks it where it is told to."""

from __future__ import annotations

import argparse
import http.server
import json
import os
import socket
import subprocess
import sys
import time


def main() -> None:
    made = argparse.ArgumentParser()
    made.add_argument("--port-range", nargs=2, type=int, default=(10000, 19999))
    made.add_argument("--status-file", required=True)
    made.add_argument("--host", default="localhost")
    made.add_argument("--timeout")
    made.add_argument("--delay", type=float, default=0.0, help="before it reports, with a line each 0.1 s unless --silent")
    made.add_argument("--silent", action="store_true")
    made.add_argument("--fail", action="store_true", help="report that it has failed")
    made.add_argument("--die", type=int, help="end with this status before it reports")
    made.add_argument("--only", action="store_true", help="write nothing but status and port")
    made.add_argument("--torn", action="store_true", help="write the file in two pieces")
    made.add_argument("--second-port", action="store_true")
    made.add_argument("--status", type=int, default=200)
    made.add_argument("--children", action="store_true", help="start one that ignores SIGTERM in a session of its own")
    made.add_argument(
        "--orphan", action="store_true", help="start one that no parent and no session leads to, and that ignores SIGTERM"
    )
    made.add_argument("--nobody", action="store_true", help="then become another user")
    made.add_argument("--wiped", action="store_true", help="start one that carries nothing of it, in its session")
    made.add_argument("--again", action="store_true", help="start one that starts another when it is told to end")
    made.add_argument("--daemon", action="store_true", help="go on as a process that no parent leads to")
    made.add_argument("--report", help="the status that it reports")
    made.add_argument("--spoil", help="what becomes of the state file then: gone, directory, fifo, or its text")
    made.add_argument("--fail-until", type=int, default=0, help="end with status 3 before it reports, so many starts")
    made.add_argument("--lines", type=int, help="then write that many numbered lines")
    made.add_argument("--tick", action="store_true", help="then a numbered line each 10 ms")
    made.add_argument("--show", help="print this variable of the environment")
    made.add_argument("workdir", nargs="*")
    given = made.parse_args()
    print("args", json.dumps(given.workdir), flush=True)
    if given.show:
        print(f"{given.show}={os.environ.get(given.show)}", flush=True)
    if given.fail_until:
        with open("starts", "a+", encoding="ascii") as starts:
            starts.write("x")
            starts.seek(0)
            if len(starts.read()) <= given.fail_until:
                sys.exit(3)
    if given.daemon and os.fork():
        os._exit(0)
    if given.daemon:
        os.setsid()
    until = time.monotonic() + given.delay
    while time.monotonic() < until:
        if not given.silent:
            print("waiting", flush=True)
        time.sleep(0.1)
    if given.die is not None:
        print("last words", flush=True)
        sys.exit(given.die)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(given.status if self.path.startswith("/healthcheck") else 404)
            self.end_headers()
            self.wfile.write(str(os.getpid()).encode())

        def log_message(self, *_: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in given.host else socket.AF_INET

    def listening() -> http.server.HTTPServer:
        for port in range(given.port_range[0], given.port_range[1] + 1):
            try:
                return Server((given.host, port), Handler)
            except OSError:
                continue
        raise SystemExit("no port is free")

    server = listening()
    with open(given.status_file, encoding="utf-8") as file:
        state = {} if given.only else json.load(file)
    state["status"] = given.report or ("failed" if given.fail else "running")
    if not given.fail:
        state["port"] = server.server_address[1]
    if given.second_port:
        other = listening()
        import threading

        threading.Thread(target=other.serve_forever, daemon=True).start()
        state["admin_port"] = other.server_address[1]
    if given.children:
        code = "import signal, time; signal.signal(15, signal.SIG_IGN); print('child', flush=True); time.sleep(1000)"
        child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stdout=subprocess.PIPE)
        assert child.stdout and child.stdout.readline()
        state["child"] = child.pid
    if given.orphan:
        code = "import signal, sys, time; signal.signal(15, signal.SIG_IGN); open('orphan', 'w').write(str(__import__('os').getpid()) + '\\n'); time.sleep(1000)"
        subprocess.run(["sh", "-c", 'setsid "$@" & exit 0', "sh", sys.executable, "-c", code], check=True)
        while not os.path.exists("orphan") or not open("orphan").read().endswith("\n"):
            time.sleep(0.01)
    if given.wiped:
        state["wiped"] = subprocess.Popen(["sleep", "1000"], env={}).pid
    if given.again:
        code = (
            "import os, signal, subprocess, time\n"
            "def again(*_): subprocess.Popen(['sleep', '1000'], start_new_session=True); os._exit(0)\n"
            "signal.signal(15, again); print('ready', flush=True); time.sleep(1000)"
        )
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert child.stdout and child.stdout.readline()
    text = json.dumps(state)
    if given.torn:
        with open(given.status_file, "w", encoding="utf-8") as file:
            file.write(text[: len(text) // 2])
            file.flush()
            time.sleep(0.3)
            file.write(text[len(text) // 2 :])
    else:
        with open(given.status_file + ".new", "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(given.status_file + ".new", given.status_file)
    if given.spoil:
        os.unlink(given.status_file)
        if given.spoil == "directory":
            os.mkdir(given.status_file)
        elif given.spoil == "fifo":
            os.mkfifo(given.status_file)
        elif given.spoil != "gone":
            with open(given.status_file, "w", encoding="utf-8") as file:
                file.write(given.spoil.replace("empty", ""))
    if given.nobody:
        import ctypes

        os.setgid(65534)
        os.setuid(65534)
        ctypes.CDLL(None).prctl(4, 1)  # PR_SET_DUMPABLE, as after an exec: its files in /proc are its own
    if given.lines:
        for number in range(given.lines):
            print(f"line {number:08d}")
        sys.stdout.flush()
    if given.tick:
        import itertools
        import threading

        def tick() -> None:
            for number in itertools.count():
                print(f"tick {number:08d}", flush=True)
                time.sleep(0.01)

        threading.Thread(target=tick, daemon=True).start()
    server.serve_forever()


if __name__ == "__main__":
    main()
