"""`SshDevice`: a Linux board with Python and ExecuTorch's wheel, behind OpenSSH's client.

All commands share one connection (ControlMaster), so that a login is not repeated for each.
"""

import contextlib
import json
import shlex
import shutil
import subprocess
import tempfile
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from flash.device.answers import Probe, check_clock, claimed_s, read_answer, read_result
from flash.device.base import check_files, check_loaded
from flash.device.host import RUNNER, exit_reason
from flash.device.measurement import Program
from flash.device.processes import Output, run_bounded
from flash.device.remote import ConnectionLost, RemoteDevice, unit_of
from flash.device.settings import DeviceSettings
from flash.errors import DeviceError, InputError

PROBE = Path(__file__).with_name("system_info.py").read_text(encoding="utf-8")
"""Script that the board's Python runs once to describe the board; it must suit old versions."""

# Stdin ends when our ssh client does: by Ctrl-C, kill or a cut cable. The runner then ends too and
# does not go on heating the board.
WATCHDOG_SCRIPT = """
import os, runpy, sys, threading
def watch():
    os.read(0, 1)
    os._exit(1)
threading.Thread(target=watch, daemon=True).start()
sys.argv[:] = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class SshDevice(RemoteDevice):
    """A board that runs runner.py as the host does."""

    def __init__(self, settings: DeviceSettings) -> None:
        super().__init__(settings, settings.ssh)
        self._ssh = settings.ssh
        for name in ("identity", "known_hosts"):
            path = getattr(self._ssh, name)
            if path is not None and not Path(path).expanduser().is_file():
                raise InputError(f"device.ssh.{name}={path}: no such file")
        self._jobs = 0
        # Short: a socket's path has at most 107 characters.
        self._control = tempfile.mkdtemp(prefix="flash-ssh-")
        self._command = self._client()
        weakref.finalize(self, _close_connection, self._command, self._control)

    @property
    def where(self) -> str:
        port = "" if self._ssh.port is None else f":{self._ssh.port}"
        return f"{self._ssh.host}{port}"

    def _identify(self) -> dict[str, str | int]:
        """Processor, unit, cores, threads, CPUs, system and runtime of the board."""
        probed = self._retrying(self._probe)
        # An image that was copied to many boards may have an empty file.
        name = "grep . /etc/machine-id 2>/dev/null || uname -n"
        machine = self._retrying(lambda: self._ask(name))
        self._check_cores(probed.cores)
        self.check_huge_pages(probed.no_huge_pages)
        return {
            "device": self.settings.name,
            "cpu": probed.cpu,
            "unit": unit_of(machine.strip()),  # the same by any of its addresses
            "cores": probed.cores,
            "threads": self.settings.threads,
            "cpus": ",".join(map(str, self.settings.pinned or ())),
            "system": probed.system,
            "runtime": probed.runtime,
        }

    def run(self, job: dict[str, Any], programs: Sequence[Program]) -> dict[str, Any]:
        """Run a job in one process of runner.py on the board; see `Device.run`."""
        check_files(programs)
        self.identity()
        placed = self._place([RUNNER, *(program.path for program in programs)])
        specs = [{**spec, "path": placed[Path(spec["path"])]} for spec in job["programs"]]
        remote_job = {**job, "programs": specs}
        label = ", ".join(program.name for program in programs)
        return check_loaded(
            self._retrying(lambda: self._run_once(remote_job, placed[RUNNER], label))
        )

    def _run_once(self, job: dict[str, Any], runner: str, label: str) -> dict[str, Any]:
        self._jobs += 1
        folder = self._path("jobs", f"{self._token}-{self._jobs}")
        job_path, result_path = f"{folder}/job.json", f"{folder}/result.json"
        variables = self.settings.variables
        environment = ["env", *(f"{name}={value}" for name, value in variables.items())]
        runner_words = ["-c", WATCHDOG_SCRIPT, runner, job_path, result_path]
        command = [*environment, self._ssh.python, *runner_words]
        forget = shlex.join(["rm", "-rf", folder])
        timeout_s = self.timeout_s(job)
        try:
            with tempfile.TemporaryFile(buffering=0) as file:
                file.write(json.dumps(job).encode())
                file.seek(0)
                script = f"mkdir -p {shlex.quote(folder)} && cat > {shlex.quote(job_path)}"
                self._ask(script, stdin=file)
            began = time.monotonic()
            output = self._shell(shlex.join(command), timeout_s=timeout_s, stdin=subprocess.PIPE)
            elapsed_s = time.monotonic() - began
            if "No space left" in output.err:
                raise self.refused(output)
            if output.code != 0:
                raise DeviceError(f"{label}: {exit_reason(output.code, output.err)}")
            text = self._ask(f"cat {shlex.quote(result_path)} && {forget}")
            result = read_result(text, job, label)
            check_clock(claimed_s(result), elapsed_s, label)
            return result
        except BaseException as error:
            self._forget(forget)
            if isinstance(error, subprocess.TimeoutExpired):
                raise DeviceError(
                    f"{label}: no result after {timeout_s:.0f} s; if the board is just slow, raise "
                    "device.run_timeout_s"
                ) from None
            raise

    def _probe(self) -> Probe:
        """Ask the board's Python for processor, cores, system and runtime.

        Raises:
            InputError: The board lacks that Python, or the Python lacks ExecuTorch or torch.
            DeviceError: The Python fails, or its answer is none.
        """
        python = self._ssh.python
        try:
            output = self._shell(shlex.join([python, "-c", PROBE]))
        except subprocess.TimeoutExpired:
            raise ConnectionLost("no answer") from None
        if output.code in (126, 127):
            raise InputError(
                f"device.ssh.python={python}: no such program on {self.where}; name one of an "
                "environment there that has executorch and torch"
            )
        label = f"device.ssh.python={python} on {self.where}"
        if output.code != 0:
            raise DeviceError(f"{label}: exit code {output.code}: {output.last_line}")
        # A Python may print a greeting too, for example in its sitecustomize.
        lines = [line for line in output.out.splitlines() if line.startswith("{")]
        probed = read_answer(Probe, lines[-1] if lines else output.out, label)
        if not probed.runtime:
            raise InputError(
                f"device.ssh.python={python}: has no executorch with torch on {self.where}; there "
                f"run `{python} -m pip install executorch==1.5.1 torch==2.13.0`, or name another "
                "Python"
            )
        return probed

    def _client(self) -> list[str]:
        """The ssh command with all options, up to the host's name."""
        ssh = self._ssh
        options = {
            "BatchMode": "yes",
            "StrictHostKeyChecking": "yes",
            "ConnectTimeout": str(ssh.connect_timeout_s),
            "ServerAliveInterval": "5",
            "ServerAliveCountMax": "3",
            "LogLevel": "ERROR",
            "RemoteCommand": "none",
            "ControlMaster": "auto",
            "ControlPath": f"{self._control}/c",
            "ControlPersist": "60",  # [s]; ends the connection if we are killed
        }
        if ssh.known_hosts is not None:
            options["UserKnownHostsFile"] = _option_path(ssh.known_hosts)
            options["GlobalKnownHostsFile"] = "/dev/null"
        if ssh.identity is not None:
            options["IdentityFile"] = _option_path(ssh.identity)
            options["IdentitiesOnly"] = "yes"
        command = ["ssh", "-T"]
        for name, value in options.items():
            command += ["-o", f"{name}={value}"]
        if ssh.port is not None:
            command += ["-p", str(ssh.port)]
        if ssh.user is not None:
            command += ["-l", ssh.user]
        return [*command, "--", ssh.host]

    def _execute(self, script: str, timeout_s: float, stdin: IO[bytes] | int) -> Output:
        return run_bounded([*self._command, script], timeout_s, stdin)

    def _failure(self, output: Output) -> Exception:
        text = output.err
        if "HOST IDENTIFICATION HAS CHANGED" in text:
            return InputError(
                f"device.ssh.known_hosts: {self.where} shows another key than the one kept; if it "
                "was set up anew, remove the old one with `ssh-keygen -R`, else somebody may be "
                "in between"
            )
        if "Host key verification failed" in text or "host key is known" in text:
            return InputError(
                f"device.ssh.known_hosts: the key of {self.where} is not in it; log in once by "
                "hand, or append the line of `ssh-keyscan` after comparing the fingerprint"
            )
        if "Permission denied" in text:
            return InputError(
                f"device.ssh.identity: {self.where} refuses the key; put the public one into "
                "~/.ssh/authorized_keys there (`ssh-copy-id`), or name another key or user"
            )
        # Without the mark of its begin a command has not run; other codes are a login shell's own.
        if "flash-begin:" not in output.out and 0 <= output.code < 255:
            return DeviceError(
                f"{self.where}: its login shell runs no commands (exit code {output.code}: "
                f"{output.last_line}); expected a shell such as sh, bash or fish"
            )
        return ConnectionLost(f"connection failed: {Output(0, '', text).last_line}")

    def _copy(self, path: Path, part: str) -> None:
        """Append the bytes that `part` lacks, so that an interrupted copy continues."""
        quoted = shlex.quote(part)
        size = f"if [ -f {quoted} ]; then stat -c %s {quoted}; else echo 0; fi"
        there = self._number(self._ask(size))
        with open(path, "rb", buffering=0) as file:
            file.seek(there)
            try:
                output = self._shell(
                    f"LC_ALL=C cat >> {quoted}", timeout_s=self._link.push_timeout_s, stdin=file
                )
            except subprocess.TimeoutExpired:
                raise ConnectionLost(
                    f"{path.name} was not copied within {self._link.push_timeout_s:.0f} s"
                ) from None
        if output.code != 0:
            raise self.refused(output)

    def _reconnect(self) -> None:
        """Close the shared connection, whose client may not have noticed that it is dead."""
        _exit_master(self._command)


def _option_path(path: str) -> str:
    """Quote a path for an option of ssh, which splits at spaces and expands percent signs."""
    return '"' + str(Path(path).expanduser()).replace("%", "%%") + '"'


def _exit_master(command: list[str]) -> None:
    """Tell the process that holds the shared connection to end."""
    with contextlib.suppress(subprocess.TimeoutExpired, InputError, DeviceError):
        run_bounded([command[0], "-O", "exit", *command[1:]], 10.0)


def _close_connection(command: list[str], folder: str) -> None:
    """Close the shared connection, if there is one, and remove its folder."""
    if Path(folder, "c").exists():
        _exit_master(command)
    shutil.rmtree(folder, ignore_errors=True)
