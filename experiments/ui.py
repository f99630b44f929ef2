"""`make ui`: the MLflow UI on loopback over the project's store, opened at the last sweep's comparison."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import webbrowser
from typing import Any

from experiments.mlflow_view import view_key
from experiments.paths import MLFLOW, tracking_uri
from experiments.report import LAST
from experiments.tracking import ui_url

HOST = "127.0.0.1"
STARTUP_LIMIT_S = 90.0


def last_sweep() -> dict[str, Any] | None:
    """What the last sweep left about itself; None if there was none."""
    path = MLFLOW / LAST
    if not path.is_file():
        return None
    try:
        loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return loaded


def free_port(wanted: int) -> int:
    """`wanted` if nobody listens there, else any free port."""
    with contextlib.closing(socket.socket()) as probe:
        try:
            probe.bind((HOST, wanted))
        except OSError:
            probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def start(port: int, uri: str) -> subprocess.Popen[bytes]:
    """Start the server through mlflow/start.sh, which `make ui` and a service unit share."""
    environment = {**os.environ, "PORT": str(port), "STORE": uri, "PYTHON": sys.executable}
    return subprocess.Popen(["bash", str(MLFLOW / "start.sh")], env=environment)


def wait_until_ready(server: subprocess.Popen[bytes], port: int) -> bool:
    """Poll the server's health page; False when the server ends or the time is up."""
    deadline = time.monotonic() + STARTUP_LIMIT_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never by way of a proxy
            with direct.open(f"http://{HOST}:{port}/health", timeout=2) as answer:
                return int(answer.status) == 200
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    return False


def page(port: int) -> str:
    """The URL to open: the last sweep's comparison, or the list of experiments."""
    last = last_sweep()
    if last is None:
        return f"http://{HOST}:{port}/"
    return ui_url(HOST, port, last["experiment_id"], last["sweep_id"], view_key(last["sweep_id"]))


def main() -> None:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(prog="make ui", description=__doc__)
    parser.add_argument("--port", type=int, default=5000, help="wanted port; another if it is taken")
    parser.add_argument("--no-browser", action="store_true", help="only print the address")
    arguments = parser.parse_args()
    last = last_sweep() or {}
    port = free_port(arguments.port)
    server = start(port, last.get("uri") or tracking_uri())
    try:
        if not wait_until_ready(server, port):
            print("ui: the MLflow server did not start; its messages are above", file=sys.stderr)
            raise SystemExit(1)
        address = page(port)
        if not last:
            print("no sweep was logged yet: `make run` makes one")
        print(f"MLflow UI: {address}\n(Ctrl-C stops it)", flush=True)
        if not arguments.no_browser and _has_display():
            webbrowser.open(address)
        server.wait()
    except KeyboardInterrupt:
        pass
    finally:
        server.terminate()
        try:
            server.wait(timeout=10)
        except subprocess.TimeoutExpired:
            server.kill()


def _has_display() -> bool:
    """Whether a browser can be shown: always on macOS and Windows, with a display elsewhere."""
    return sys.platform in ("darwin", "win32") or bool(
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    )


if __name__ == "__main__":
    main()
