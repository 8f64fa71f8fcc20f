"""Your code and your wheels on a host that has neither: this machine as the host, so that it runs anywhere with an index.

python examples/ship_your_code.py [HOST]
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from plumbum import local

from zerodeploy import DeployedServer, PayloadError

PACKAGE = {
    "mypkg/__init__.py": '"""A package with a module, data and state."""\n\nimport re\n\nWORD = re.compile(r"\\w+")\n',
    "mypkg/words.py": "from importlib import resources\n\nfrom mypkg import WORD\n\n\n"
    "def known():\n    return set(WORD.findall((resources.files('mypkg') / 'words.txt').read_text()))\n\n\n"
    "def unknown(text):\n    return sorted(set(WORD.findall(text)) - known())\n",
    "mypkg/words.txt": "the quick brown fox\n",
    "mypkg/cli.py": "import sys\n\nfrom mypkg.words import unknown\n\n\n"
    "def main():\n    import six\n\n    print('unknown:', *unknown(' '.join(sys.argv[1:])), 'with six', six.__version__)\n",
}


def largest_singular_value(rows: list) -> float:
    import numpy  # the host's Python gets the wheel that fits it

    return float(numpy.linalg.svd(numpy.array(rows))[1].max())


def main() -> None:
    host = sys.argv[1] if len(sys.argv) > 1 else local
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name, text in PACKAGE.items():
            (root / name).parent.mkdir(exist_ok=True)
            (root / name).write_text(text)
        sys.path.insert(0, folder)
        import mypkg.words

        with DeployedServer(host, modules=[mypkg], requirements=["numpy"]) as server:
            print("modules=:", server.call(mypkg.words.unknown, "the lazy dog"))
            print("requirements=:", largest := server.call(largest_singular_value, [[3.0, 0.0], [0.0, 4.0]]))
            assert largest == 4.0
            python = server.info.executable
            done = server.run([python, "-c", "import numpy, mypkg; print('and in processes')"], text=True, check=True)
            print(done.stdout.strip())
            print("over RPyC:", server.classic_connect().modules.numpy.arange(5).sum())

        with DeployedServer(host, forward_imports=["mypkg"]) as server:  # nothing is sent before it is imported
            print("forward_imports=:", server.call("mypkg.words:unknown", "quick fox, slow cat"))

        for _ in range(2):
            with DeployedServer(host, requirements=["six"], keep="cache") as server:  # the second time nothing is sent
                print('keep="cache":', server.info.bytes_sent, "bytes sent")
        with DeployedServer(host) as server:
            print("cleared:", len(server.call("zerodeploy_agent.kept:clear_kept")["bundles"]), "bundle")

        tool = root / "tool.pyz"
        words = ["build", "six", "-m", str(root / "mypkg"), "-e", "mypkg.cli:main", "-o", str(tool)]
        subprocess.run([sys.executable, "-m", "zerodeploy", *words], check=True, stdout=subprocess.DEVNULL)
        with DeployedServer(host, zipapp=tool) as server:
            print("zipapp=:", server.call("mypkg.words:unknown", "a brown bear"))
            print(server.run([server.info.executable, server.zipapp, "fox", "trot"], text=True, check=True).stdout.strip())

        try:
            DeployedServer(host, requirements=["numpy<1", "numpy>2"])
        except PayloadError as error:
            print("what can't be had:", str(error)[:60], "…")

        with DeployedServer(host, python="ship") as server:  # where the host has none, Debian's goes along
            print('python="ship":', server.info.python)


if __name__ == "__main__":
    main()
