"""The example notebook and the life of a kernel, with a real one."""

from __future__ import annotations

import os
import queue
import signal
import threading
import time
from pathlib import Path

import nbclient
import nbformat
import pytest
from jupyter_client.manager import start_new_kernel

from tests.conftest import wait_until

NOTEBOOK = Path(__file__).parent.parent / "examples" / "cluster_probe.ipynb"
pytestmark = pytest.mark.filterwarnings("default")  # the kernel's own machinery warns, with each version of other things


@pytest.fixture
def home(tmp_path, monkeypatch):
    """No configuration of the user's, and its files where the test is."""
    for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    return tmp_path


def inventory(network, tmp_path, *names):
    file = tmp_path / "hosts.yaml"
    file.write_text(f"defaults: {{ssh_config: {network.config}}}\ngroups:\n  all: {{hosts: [{', '.join(names)}]}}\n")
    return f"@{file}"


def outputs(cell, kind):
    return [str(out.data[kind]) for out in cell.outputs if kind in out.get("data", {})]


def executed(**environment):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    env = {**os.environ, **environment}
    nbclient.NotebookClient(notebook, timeout=60, kernel_name="python3").execute(env=env)
    return {cell["id"]: cell for cell in notebook.cells if cell.cell_type == "code"}


def text_of(cell):
    return "".join(out.get("text", "") for out in cell.outputs if out.output_type == "stream")


def test_the_example_over_the_network(network, home):
    network["bastion"].power_off()
    hosts = inventory(network, home, "h38", "h311", "h313", "nopython")
    cells = executed(ZERODEPLOY_HOSTS=hosts)
    first, *_ = outputs(cells["cell-1"], "text/html")[-1:]
    assert first.count("<td>open</td>") == 3 and "PythonNotFound" in first and "<td>3.8." in first
    table = outputs(cells["cell-4"], "text/html")[-1]
    assert all(f"<td>{node}</td>" in table for node in ("h38", "h311", "h313")) and "<th>cores</th>" in table
    assert outputs(cells["cell-5"], "text/html")[-1].count("<td>Linux ") == 3
    assert "<th>load</th>" in outputs(cells["cell-7"], "text/html")[-1]
    assert "(120, {" in outputs(cells["cell-9"], "text/plain")[-1]
    assert len(outputs(cells["cell-10"], "image/png")) == 1
    assert "nopython PythonNotFound" in text_of(cells["cell-12"])
    assert "h38: ok after" in text_of(cells["cell-3"])
    assert "<td>open</td>" not in outputs(cells["cell-13"], "text/html")[-1]
    network.assert_clean(1)


def test_the_example_on_this_machine(home):
    cells = executed(ZERODEPLOY_HOSTS="")
    assert outputs(cells["cell-1"], "text/html")[-1].count("<td>open</td>") == 2
    assert len(outputs(cells["cell-10"], "image/png")) == 1


def test_the_example_is_kept_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)


class Kernel:
    """A kernel of its own; `run` gives what a piece of code displays and prints, and the error that it ends with."""

    def __init__(self) -> None:
        self.manager, self.client = start_new_kernel(kernel_name="python3")

    def run(self, code, timeout_s=60):
        request = self.client.execute(code)
        shown, error = [], ""
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            try:
                message = self.client.get_iopub_msg(timeout=1)
            except queue.Empty:
                continue
            if message["parent_header"].get("msg_id") != request:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "status" and content["execution_state"] == "idle":
                return shown, error
            if kind == "error":
                error = content["ename"]
            elif kind == "stream":
                shown.append(content["text"])
            elif kind in ("display_data", "update_display_data", "execute_result"):
                shown.append(content["data"].get("text/html") or content["data"].get("text/plain"))
        raise AssertionError(f"no end within {timeout_s} s: {shown}")

    def restart(self):
        self.manager.restart_kernel(now=False)

    def reconnect(self):
        """As notebooks do after a restart: new sockets, and questions until answers are published to them, too."""
        self.client.stop_channels()
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=30)
        for _ in range(60):
            self.client.kernel_info()
            try:
                self.client.get_iopub_msg(timeout=0.5)
                return
            except queue.Empty:
                continue
        raise AssertionError("the restarted kernel publishes nothing")

    def close(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@pytest.fixture
def kernel(home):
    kernel = Kernel()
    yield kernel
    kernel.close()


DEPLOY = "from zerodeploy import MultiServerDeployment\ndep = MultiServerDeployment({!r}, on_error='keep')\nprint(len(dep.live))"


def test_progress_is_drawn_over_again(network, home, kernel):
    shown, error = kernel.run(DEPLOY.format(inventory(network, home, "h38", "h311")))
    assert not error and shown[-1] == "2\n"
    shown, error = kernel.run("import time\nrows = dep.call('time:sleep', 1.2).ordered()")
    drawn = [text for text in shown if "<progress" in text]
    assert not error and len(drawn) >= 3 and "0/2" in drawn[0] and "2/2" in drawn[-1]
    assert not any("<progress" in text for text in kernel.run("dep.call('os:getpid').ordered()")[0]), "short work shows nothing"
    shown, error = kernel.run("dep.map('time:sleep', [0.4] * 4)")
    assert not error and "4/4" in [text for text in shown if "<progress" in text][-1]


def test_interrupting_a_cell_leaves_the_deployment_usable(network, home, kernel):
    kernel.run(DEPLOY.format(inventory(network, home, "h38", "h311")))
    threading.Timer(1.0, os.kill, (kernel.manager.provisioner.pid, signal.SIGINT)).start()
    began = time.monotonic()
    shown, error = kernel.run("rows = dep.call('time:sleep', 60)\nrows.ordered()")
    assert error == "KeyboardInterrupt" and time.monotonic() - began < 10
    shown, error = kernel.run("[row.status for row in rows]")
    assert not error and "['InterruptedError', 'InterruptedError']" in shown[-1]
    shown, error = kernel.run("sorted(dep.call('platform:node').values())")
    assert not error and "['h311', 'h38']" in shown[-1]


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "a call is running"])
def test_a_restart_of_the_kernel_waits_for_nobody_and_leaves_nothing(network, home, kernel, busy):
    kernel.run(DEPLOY.format(inventory(network, home, "h38", "h311", "h313")))
    if busy:
        kernel.run("rows = dep.call('time:sleep', 60)")
    assert len(network.left()) == 3
    began = time.monotonic()
    kernel.restart()
    took_s = time.monotonic() - began
    wait_until(lambda: not network.left(), 2, lambda: f"left: {network.left()}")
    assert took_s < 4, "it ended by itself, and was not waited for until it was killed"
    kernel.reconnect()
    shown, error = kernel.run("1 + 1")
    assert not error and shown == ["2"]


def test_a_restart_with_silent_links(network, home, kernel):
    """Nobody answers the goodbye: the kernel does not wait for one after the other."""
    kernel.run(DEPLOY.format(inventory(network, home, "h38", "h311", "h313", "bastion")).replace("'keep'", "'keep', keepalive=1"))
    for name in ("h38", "h311", "h313", "bastion"):
        network[name].freeze()
    began = time.monotonic()
    kernel.restart()
    assert time.monotonic() - began < 4.5
    wait_until(lambda: not network.left(), 3 * 1 + 2, lambda: f"left: {network.left()}")
