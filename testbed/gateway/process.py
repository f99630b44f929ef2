"""The gateway as a supervised process of its own: how the testbed runs it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

from ersim.errors import ErsimError
from ersim.util.files import write_json
from testbed.expert_server import answers, with_project
from testbed.gateway.settings import GatewaySettings, check, to_dict

READY_TIMEOUT_S = 60.0


class GatewayFailed(ErsimError, RuntimeError):
    """The gateway did not start, or has ended; the message ends with its output."""


class GatewayProcess:
    """Context manager: the gateway listens inside, and is gone afterwards.

    `cores` binds it to CPU cores; `wait_ready` False only waits until the gateway itself answers.
    """

    def __init__(
        self, settings: GatewaySettings, folder: Path, cores: list[int] | None = None, wait_ready: bool = True
    ) -> None:
        check(settings)
        self.settings = settings
        self.log_path = folder / "gateway.log"
        self._settings_path = folder / "gateway.json"
        self._cores = cores
        self._path = "/ready" if wait_ready else "/health"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Base URL."""
        return self.settings.url

    def __enter__(self) -> GatewayProcess:
        write_json(self._settings_path, to_dict(self.settings))
        if self.settings.api_keys:
            self._settings_path.chmod(0o600)  # they stand in it
        command = [sys.executable, "-m", "testbed.supervisor", "--"]
        if self._cores:
            command += ["taskset", "-c", ",".join(map(str, self._cores))]
        command += [sys.executable, "-m", "testbed.gateway", str(self._settings_path)]
        with open(self.log_path, "ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=with_project(os.environ),
                start_new_session=True,
            )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def _wait(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            if answers(self.url + self._path):
                return
            time.sleep(0.1)
        raise self._failed(f"was not ready on {self.url}")

    def check_alive(self) -> None:
        """Raise GatewayFailed if the process has ended."""
        if self._process is not None and self._process.poll() is not None:
            raise self._failed(f"ended with status {self._process.returncode}")

    def _failed(self, what: str) -> GatewayFailed:
        tail = self.log_path.read_text(encoding="utf-8", errors="replace")[-2000:]
        return GatewayFailed(f"the gateway {what}; its log ({self.log_path}) ends:\n{tail}")

    def stop(self) -> None:
        """Stop the process and wait for its end; safe to call twice."""
        if self._process is None:
            return
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
