"""`AndroidDevice`: a phone behind adb, on which ExecuTorch's own llama_main runs the programs.

Phones have no Python, so only the work of llama_main can be timed: whole models, with a prompt and
the decode steps after it. A warm phone lowers its clocks (it throttles). Therefore each process
waits until the phone is cool, and a process during which the phone throttled is rejected and
counted.
"""

import logging
import re
import shlex
import shutil
import subprocess
import tempfile
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from flash.device import llama_main, thermal
from flash.device.answers import check_clock
from flash.device.base import check_files, check_loaded
from flash.device.host import exit_reason
from flash.device.measurement import Program
from flash.device.processes import Output, brief, run_bounded
from flash.device.remote import (
    ConnectionLost,
    RemoteDevice,
    content_name,
    sha256_of,
    unit_of,
)
from flash.device.settings import DeviceSettings
from flash.errors import DeviceError, InputError

PROPERTIES = (
    *("ro.product.model", "ro.soc.model", "ro.board.platform"),
    *("ro.build.fingerprint", "ro.serialno"),
)
log = logging.getLogger(__name__)
POLL_S = 3.0
"""Time between two readings of a phone that cools down [s]."""
# Words in the output of a llama_main that refuses a program.
_UNLOADABLE = re.compile(r"load|schema|version|operator|kernel|verif", re.IGNORECASE)


class AndroidDevice(RemoteDevice):
    """One phone, found by its serial number."""

    times_blocks = False
    runs_texts = False

    def __init__(self, settings: DeviceSettings) -> None:
        super().__init__(settings, settings.android)
        self._android = settings.android
        self._runner = _existing_file("runner", self._android.runner)
        self._tokenizer = _existing_file("tokenizer", self._android.tokenizer)
        self._prompts = llama_main.Prompts(self._tokenizer)
        self._prompt_files = tempfile.mkdtemp(prefix="flash-prompts-")
        weakref.finalize(self, shutil.rmtree, self._prompt_files, ignore_errors=True)
        self._serial: str | None = None
        self._throttled = 0
        self._thermal_logged = False

    @property
    def where(self) -> str:
        return f"phone {self._serial or self._android.serial or ''}".rstrip()

    def _identify(self) -> dict[str, str | int]:
        """Model, unit, chip, cores, threads, CPUs, build and runner of the phone."""
        model, chip, platform, fingerprint, serial, possible = self._properties()
        last = re.fullmatch(r"(?:.*[-,])?(\d{1,4})", possible)
        if not fingerprint or last is None:
            raise DeviceError(
                f"{self.where}: has no build fingerprint or list of CPUs, as every Android has "
                f"(found '{fingerprint}', '{possible}')"
            )
        cores = int(last[1]) + 1
        self._check_cores(cores)
        return {
            "device": self.settings.name,
            "cpu": chip or platform,
            "model": model,
            "unit": unit_of(serial or str(self._serial)),  # the same over USB and over Wi-Fi
            "cores": cores,
            "threads": self.settings.threads,
            "cpus": ",".join(map(str, self.settings.pinned or ())),
            "system": f"Android {_build(fingerprint)}",
            "runtime": f"llama_main {sha256_of(self._runner)[:12]}",
        }

    def _properties(self) -> list[str]:
        """Values of `PROPERTIES` and the range of CPUs; "" for what the phone does not say."""
        asked = (
            f"for p in {shlex.join(PROPERTIES)}; do "
            'echo "$p=$(getprop "$p" 2>/dev/null)"; done; '
            "echo cpus=$(cat /sys/devices/system/cpu/possible 2>/dev/null); true"
        )
        answer = f"\n{self._retrying(lambda: self._ask(asked))}"
        rests = [answer.partition(f"\n{name}=")[2] for name in (*PROPERTIES, "cpus")]
        return [brief(rest.partition("\n")[0].strip()) for rest in rests]

    def run(self, job: dict[str, Any], programs: Sequence[Program]) -> dict[str, Any]:
        """Run a measuring job; each sample is a fresh process of llama_main.

        Raises:
            InputError: The job does not measure whole models, or a program is refused.
            DeviceError: llama_main died, or the phone is disconnected or stays hot.
        """
        self._check_job(job, programs)
        check_files(programs)
        self.identity()
        started, began, self._throttled = time.time(), time.monotonic(), 0
        before = self._read()
        points = [(phase, tokens, f"{phase}_{tokens}") for phase, tokens in job["points"]]
        samples = {p.name: {name: [] for _, _, name in points} for p in programs}
        loads: dict[str, list[float]] = {program.name: [] for program in programs}
        loaded_kib, peak_kib = dict.fromkeys(loads, 0), 0
        for _ in range(job["runs"]):
            for program in programs:
                for tokens in dict.fromkeys(tokens for _, tokens in job["points"]):
                    run = self._time(program, tokens, job["decode_tokens"], job["warmups"] > 0)
                    for phase, length, name in points:
                        if length == tokens:
                            samples[program.name][name].append(_sample(phase, run))
                    loads[program.name].append(run.load_ms)
                    loaded_kib[program.name] = run.rss_kib[0]
                    peak_kib = max(peak_kib, run.rss_kib[1])
        return {
            "started": started,
            "start_ms": 0.0,
            "runtime": self.identity()["runtime"],
            "baseline_rss_kib": 0,
            "load_ms": {name: min(times) for name, times in loads.items()},
            "load_rss_kib": loaded_kib,
            "peak_rss_kib": peak_kib,
            "samples": samples,
            "load_average": 0.0,
            "process": {"wall_s": time.monotonic() - began},
            "device": {
                "throttled": self._throttled,
                "before": vars(before),
                "after": vars(self._read()),
            },
        }

    def _check_job(self, job: dict[str, Any], programs: Sequence[Program]) -> None:
        """Check that llama_main can run a job.

        Raises:
            InputError: The job does not measure whole models on prompts of at least one token.
        """
        name = f"device={self.settings.name}"
        if job["mode"] != "measure":
            raise InputError(
                f"{name}: llama_main neither scores text nor continues tokens; do that on "
                "device=host, the file is the same"
            )
        for program in programs:
            if program.model_dim is not None:
                raise InputError(
                    f"{name}: llama_main times whole models only, not blocks as {program.name}; "
                    "choose latency=analytical"
                )
        if any(tokens < 1 for _, tokens in job["points"]):
            raise InputError(
                f"{name}: device.workload.contexts=[0]: expected 1 or more; llama_main needs a "
                "prompt"
            )

    def _time(self, program: Program, tokens: int, steps: int, warmup: bool) -> llama_main.Run:
        """Run processes on a prompt of exactly `tokens` tokens until one did not throttle.

        Raises:
            InputError: llama_main splits the prompt into another number of tokens.
            DeviceError: Too many processes in a row throttled.
        """
        prompt = self._prompts.of_length(tokens)
        for _ in range(self._android.throttled_retries + 1):
            self._wait_until_cool()
            # The first new token comes from the prompt's own logits: it is no decode step.
            run = self._retrying_run(program, prompt, steps + 1, warmup)
            if run.prompt_tokens != tokens:
                raise InputError(
                    f"device.android.tokenizer={self._tokenizer}: makes {tokens} tokens of a "
                    f"prompt of which llama_main makes {run.prompt_tokens}; name the programs' own"
                )
            if not self._throttles(self._read()):
                return run
            self._throttled += 1
        raise DeviceError(
            f"{self.where}: throttled in {self._android.throttled_retries + 1} processes in a row "
            f"({self._state(self._read())}); lower device.android.cool_below_c, or cool the phone"
        )

    def _throttles(self, now: thermal.Thermal) -> bool:
        """Return True if the phone is too hot or limits the clocks of the CPUs in use."""
        limit = self._android.hot_above_c
        too_hot = limit is not None and now.celsius is not None and now.celsius > limit
        return too_hot or bool(self._capped(now))

    def _capped(self, now: thermal.Thermal) -> list[int]:
        """CPUs in use whose clocks are limited; none if the settings allow that."""
        return [] if self._android.allow_capped else now.capped(self.settings.cpus)

    def _state(self, now: thermal.Thermal) -> str:
        return f"{now.sensor or 'no sensor'} {now.celsius} C, clocks held down: {self._capped(now)}"

    def _retrying_run(
        self, program: Program, prompt: str, new_tokens: int, warmup: bool
    ) -> llama_main.Run:
        file = Path(self._prompt_files, f"{abs(hash(prompt))}.txt")
        if not file.exists():
            file.write_text(prompt, encoding="utf-8")
        placed = self._place([self._runner, self._tokenizer, file, program.path])
        words = llama_main.arguments(
            placed[program.path],
            placed[self._tokenizer],
            placed[file],
            new_tokens=new_tokens,
            threads=self.settings.threads,
            warmup=warmup,
        )
        command = [placed[self._runner], *words]
        if self.settings.cpus is not None:
            mask = sum(1 << cpu for cpu in self.settings.cpus)
            command = ["taskset", f"{mask:x}", *command]
        runs = 2 if warmup else 1
        timeout_s = self.settings.start_timeout_s + 2 * runs * self.settings.run_timeout_s
        return self._retrying(lambda: self._run_once(command, timeout_s, program.name))

    def _run_once(self, command: list[str], timeout_s: float, label: str) -> llama_main.Run:
        pid = shlex.quote(self._path(f"{self._token}.pid"))
        # adbd does not always end its children when the connection is cut, so their id is kept.
        marked = f'echo $$ > {pid}; exec "$@"'
        kill = (
            f"p=$(cat {pid} 2>/dev/null) && rm -f {pid} && "
            f"grep -q {shlex.quote(content_name(self._runner))} /proc/$p/cmdline && kill -9 $p"
        )
        self._shell_quietly(kill)
        began = time.monotonic()
        try:
            output = self._shell(shlex.join(["sh", "-c", marked, "sh", *command]),
                                 timeout_s=timeout_s)  # fmt: skip
        except subprocess.TimeoutExpired:
            self._forget(kill)
            raise DeviceError(
                f"{label}: no result after {timeout_s:.0f} s; if the phone is just slow, raise "
                "device.run_timeout_s"
            ) from None
        except ConnectionLost:
            raise
        except BaseException:  # Ctrl-C: leave no process behind
            self._forget(kill)
            raise
        elapsed_s = time.monotonic() - began
        run = llama_main.parse(output.out, output.err, label) if output.code == 0 else None
        if run is None:
            raise self._explained(output, label)
        check_clock((run.prefill_ms + run.decode_ms * run.steps) / 1e3, elapsed_s, label)
        return run

    def _shell_quietly(self, script: str) -> None:
        """Run a line of shell whose exit code does not matter.

        Raises:
            ConnectionLost: The connection failed.
        """
        try:
            self._shell(script)
        except subprocess.TimeoutExpired:
            raise ConnectionLost("no answer") from None

    def _explained(self, output: Output, label: str) -> Exception:
        """The error for a llama_main that printed no statistics.

        Raises:
            InputError: It could not load the program.
        """
        if 0 <= output.code < 126 and _UNLOADABLE.search(output.out + output.err):
            error = f"{label}: cannot be loaded ({output.last_line})"
            check_loaded({"error": error, "runtime": self.identity()["runtime"]})
        reason = exit_reason(output.code, f"{output.out}\n{output.err}")
        return DeviceError(f"{label}: {reason}; `adb logcat` on {self.where} may say more")

    def _read(self) -> thermal.Thermal:
        """Read temperature and clocks; the first time, log how the temperature is read."""
        now = thermal.parse(self._retrying(lambda: self._ask(thermal.SCRIPT)))
        if not self._thermal_logged:
            self._thermal_logged = True
            if now.celsius is None:
                log.warning(
                    "%s: no sensor shows a plausible temperature; it is not kept cool", self.where
                )
            else:
                log.info("%s: %s %.1f C, read as %s", self.where, now.sensor, now.celsius, now.unit)
        return now

    def _wait_until_cool(self) -> None:
        """Wait until the phone is below its temperature limit and no clock is limited.

        Raises:
            DeviceError: It is still warm after `cool_timeout_s`.
        """
        limit = self._android.cool_below_c
        if limit is None:
            return
        deadline = time.monotonic() + self._android.cool_timeout_s
        while True:
            now = self._read()
            if (now.celsius is None or now.celsius <= limit) and not self._capped(now):
                return
            if time.monotonic() > deadline:
                raise DeviceError(
                    f"{self.where}: still warm after {self._android.cool_timeout_s:.0f} s "
                    f"({self._state(now)}); cool it, switch power saving off, or raise "
                    "device.android.cool_below_c"
                )
            time.sleep(POLL_S)

    def _adb(self, *words: str) -> list[str]:
        port = self._android.server_port
        return [self._android.adb, *(() if port is None else ("-P", str(port))), *words]

    def _chosen(self) -> str:
        """Serial of the phone: that of the settings, else that of the only attached phone.

        Raises:
            InputError: The phone of the settings is not attached, or the settings name none and
                not exactly one is attached.
        """
        if self._serial is None:
            listed = self._listed()
            states = ", ".join(f"{serial} ({state})" for serial, state in listed.items()) or "none"
            wanted = self._android.serial
            if wanted is None and len(listed) != 1:
                raise InputError(
                    f"device.android.serial=null: expected one phone, found {states}; "
                    + ("name one" if listed else "attach one and allow USB debugging on it")
                )
            if wanted is not None and wanted not in listed:
                raise InputError(
                    f"device.android.serial={wanted}: not attached; adb lists {states}"
                )
            self._serial = wanted or next(iter(listed))
        return self._serial

    def _listed(self) -> dict[str, str]:
        """State of each attached phone by serial.

        Raises:
            ConnectionLost: The adb server fails or does not answer.
        """
        try:
            output = run_bounded(self._adb("devices"), 60.0)
        except subprocess.TimeoutExpired:
            raise ConnectionLost("the adb server does not answer") from None
        if output.code != 0:
            raise ConnectionLost(f"adb: {output.last_line}")
        pairs = (line.split("\t", 1) for line in output.out.splitlines() if "\t" in line)
        return {serial: state.strip() for serial, state in pairs}

    def _execute(self, script: str, timeout_s: float, stdin: IO[bytes] | int) -> Output:
        return run_bounded(self._adb("-s", self._chosen(), "shell", script), timeout_s, stdin)

    def _failure(self, output: Output) -> Exception:
        if "unauthorized" in output.err:
            return InputError(
                f"{self.where}: unauthorized; unlock it and accept this computer's key on its "
                "screen"
            )
        if "permissions" in output.err:
            return InputError(
                f"{self.where}: this user may not open the USB device; add a udev rule for it "
                "(Debian's android-sdk-platform-tools-common has them)"
            )
        return ConnectionLost(f"connection failed: {Output(0, '', output.err).last_line}")

    def _copy(self, path: Path, part: str) -> None:
        limit_s = self._android.push_timeout_s
        command = self._adb("-s", self._chosen(), "push", str(path), part)
        try:
            output = run_bounded(command, limit_s)
        except subprocess.TimeoutExpired:
            raise ConnectionLost(f"{path.name} was not copied within {limit_s:.0f} s") from None
        text = output.out + output.err
        if output.code == 0:
            return
        # adb puts "remote" before messages of the phone; any other failure is the connection's.
        if "No space left" in text or re.search(r"': remote (?!couldn't read)", text):
            raise self.refused(output)
        raise self._failure(output)

    def _reconnect(self) -> None:
        serial, limit_s = self._chosen(), self._android.reconnect_timeout_s
        deadline = time.monotonic() + limit_s
        while True:
            if ":" in serial:  # a phone on TCP, to which the server does not reconnect
                self._call("disconnect", serial)
                self._call("connect", serial)
            state = self._listed().get(serial, "missing")
            if state != "missing" and state != "offline":
                return
            if time.monotonic() > deadline:
                raise ConnectionLost(f"did not come back within {limit_s:.0f} s (state: {state})")
            time.sleep(0.5)

    def _call(self, *words: str) -> None:
        try:
            run_bounded(self._adb(*words), 30.0)
        except subprocess.TimeoutExpired:
            raise ConnectionLost("the adb server does not answer") from None


def _sample(phase: str, run: llama_main.Run) -> dict[str, Any]:
    """Sample of a run at one point, in the format of runner.py."""
    if phase == "prefill":
        return {"wall_s": run.prefill_ms / 1e3}
    return {"wall_s": run.decode_ms * run.steps / 1e3, "steps_ms": [run.decode_ms]}


def _build(fingerprint: str) -> str:
    """Version, id and increment of `brand/product/device:version/id/increment:type/tags`."""
    parts = fingerprint.split(":")
    return parts[1] if len(parts) == 3 else fingerprint


def _existing_file(key: str, value: str) -> Path:
    """The path of a file of the settings.

    Raises:
        InputError: There is no such file.
    """
    path = Path(value).expanduser()
    if not path.is_file():
        raise InputError(f"device.android.{key}={value}: no such file")
    return path
