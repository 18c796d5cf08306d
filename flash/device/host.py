"""`HostDevice`: this machine as a device; each process is a fresh Python that runs runner.py."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from flash.device import system_info
from flash.device.answers import read_result
from flash.device.base import Device, check_files, check_loaded
from flash.device.measurement import Program
from flash.device.processes import TooMuchOutput, brief, run_bounded
from flash.errors import DeviceError
from flash.log_filters import is_noise

RUNNER = Path(__file__).with_name("runner.py")
"""Script that runs jobs, on this machine and on boards."""


class HostDevice(Device):
    """The machine that this process runs on."""

    def _identify(self) -> dict[str, str | int]:
        """Processor, cores, threads, CPUs, system and runtime of this machine."""
        probed = dict(_probed())
        self.check_huge_pages(str(probed.pop("no_huge_pages")))
        return {
            "device": self.settings.name,
            **probed,
            "threads": self.settings.threads,
            "cpus": ",".join(map(str, self.settings.chosen_cpus or ())),
        }

    @property
    def resource(self) -> str:
        """The constant "host": settings of any name measure on the same hardware."""
        return "host"

    def run(self, job: dict[str, Any], programs: Sequence[Program]) -> dict[str, Any]:
        """Run a job in one process of runner.py; see `Device.run`."""
        check_files(programs)
        with tempfile.TemporaryDirectory(prefix="flash-") as folder:
            job_path, result_path = Path(folder, "job.json"), Path(folder, "result.json")
            job_path.write_text(json.dumps(job), encoding="utf-8")
            command = [sys.executable, str(RUNNER), str(job_path), str(result_path)]
            label = ", ".join(program.name for program in programs)
            run_process(command, self.settings.variables, self.timeout_s(job), label)
            if not result_path.is_file():
                raise DeviceError(f"{label}: the runner ended without a result")
            text = result_path.read_text(encoding="utf-8", errors="replace")
            return check_loaded(read_result(text, job, label))


def run_process(
    command: Sequence[str],
    variables: Mapping[str, str],
    timeout_s: float,
    label: str,
    text: str = "",
) -> tuple[str, str]:
    """Run one child process to its end and return its stdout and stderr.

    The child is killed if this process is interrupted.

    Args:
        command: Program and arguments.
        variables: Environment variables beside our own.
        timeout_s: Time after which the child is killed [s].
        label: Name of the work in errors.
        text: Input on stdin.

    Raises:
        DeviceError: The child exited with a code other than 0, took longer than `timeout_s`, or
            printed too much.
    """
    with tempfile.TemporaryFile() as stdin:
        stdin.write(text.encode())
        stdin.seek(0)
        try:
            output = run_bounded(command, timeout_s, stdin, {**os.environ, **variables})
        except subprocess.TimeoutExpired:
            raise DeviceError(
                f"{label}: no result after {timeout_s:.0f} s; if the device is just slow, raise "
                "device.run_timeout_s"
            ) from None
        except TooMuchOutput as error:
            raise DeviceError(f"{label}: {error}") from None
    if output.code != 0:
        raise DeviceError(f"{label}: {exit_reason(output.code, output.err)}")
    return output.out, output.err


def exit_reason(code: int, stderr: str) -> str:
    """Explain why a runner ended, from its exit code (negative: a signal) and its stderr."""
    if code in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return (
            "the runner was killed, most likely because the device's memory was full; "
            "lower latency.group_size or device.lowering.max_context, or choose a smaller model"
        )
    lines = [line for line in stderr.splitlines() if line.strip() and not is_noise(line)]
    said = " | ".join(brief(line) for line in lines[-3:])
    return f"the runner exited with code {code}: {said or 'it printed nothing'}"


@cache
def _probed() -> dict[str, str | int]:
    return system_info.probe()
