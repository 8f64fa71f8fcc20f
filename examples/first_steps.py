"""First steps: this machine as the host, so that it runs anywhere. Give a host name to use that one instead.

python examples/first_steps.py [HOST]
"""

import sys

from plumbum import local

from zerodeploy import DeployedServer

FACTOR = 1024


def memory(unit: str) -> str:
    """Runs on the host: a function of this file, with the constant that it uses."""
    with open("/proc/meminfo") as file:
        kib = int(file.readline().split()[1])
    return f"{kib // FACTOR} M{unit}"


def main() -> None:
    host = sys.argv[1] if len(sys.argv) > 1 else local
    with DeployedServer(host) as server:
        print("node:", server.call("platform:node"))
        print("memory:", server.call(memory, "iB"))
        print("uptime:", server.run(["cat", "/proc/uptime"], text=True).stdout.split()[0], "s")
        try:
            server.call(open, "/no/such/file")
        except FileNotFoundError as error:
            print("as if it were here:", type(error.original).__name__)
        connection = server.classic_connect()
        print("over RPyC:", connection.modules.sys.version.split()[0], "pid", connection.modules.os.getpid())
        print("in", server.info.private_dir, "by way of", server.info.transport)


if __name__ == "__main__":
    main()
