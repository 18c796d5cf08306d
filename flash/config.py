"""Conversion of Hydra's configuration to typed settings, and of errors to one-line messages.

The dataclasses are the schema; YAML files under `conf/` hold only values. `entry` wraps Hydra's
main: it composes the configuration, checks every key and converts it once. A mistake of the user
ends in a one-line message and exit code 2 before any work starts. Ctrl-C, SIGTERM and SIGHUP end
with exit code 128 + number and a message on how to continue.
"""

import dataclasses
import logging
import os
import re
import sys
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flash import commands, signals, slurm, sweep, terminal
from flash.bundled import CONF, bundled
from flash.compat.hydra import Job, Multirun, add_search_paths, plugin_option, run_jobs_by, this_job
from flash.compat.omegaconf import (
    accept_overrides_of_null,
    child_containers,
    child_mapping,
    interpolation,
    kind_of_items,
    resolved,
)
from flash.config_errors import explain, unknown_key, wrong_item
from flash.errors import (
    CheckFailed,
    DeviceError,
    InputError,
    ServiceError,
    os_error_number,
    printable,
    shown,
    under,
)
from flash.naming import complete_names, require_own_names
from flash.option_files import Trust, check_options, check_own_options
from flash.outcome import Outcome, noted
from flash.packages import explain_missing
from flash.paths import Runs
from flash.ranks import is_main_process
from flash.schemas import ROOTS, hint_at, holds_settings, is_alike, schema_at

log = logging.getLogger(__name__)


Settings = TypeVar("Settings")


def _config_folders(verb: str | None = None) -> list[Path]:
    """Return further folders of configuration groups: of found architectures, and the user's.

    A folder that is named after a command holds groups of this command alone, as conf/train holds
    the group `experiment` of `flash train`.

    Args:
        verb: Name of the command; None takes that of this process.
    """
    verb = verb or commands.this_verb()
    folders = [CONF / verb, Path(os.environ["FLASH_RUNS"], "conf")]
    own = Path.cwd() / "conf"
    if own.is_dir() and own.resolve() != CONF.resolve():
        folders += [own, own / verb]
    return folders


def register() -> None:
    """Register schemas, search paths and resolvers with Hydra and OmegaConf."""
    accept_overrides_of_null()
    OmegaConf.register_new_resolver("bundled", bundled, replace=True)
    store = ConfigStore.instance()
    for name, schema in ROOTS.items():
        store.store(name=f"{name}_schema", node=schema)
    add_search_paths(_config_folders)
    plugin = plugin_option("hydra/launcher", "submitit_slurm")
    if plugin is not None:
        # Plain values, since a job would get a copy of the plugin's class, which is not equal to
        # the original. Not a file in conf, since Hydra would validate a file of this name against
        # the plugin's schema, with a warning.
        values = {**plugin, **slurm.DEFAULTS}
        store.store(group="hydra/launcher", name="submitit_slurm", node=values, provider="flash")


def reject_unknown_keys(node: DictConfig, root: type, path: list[str] | None = None) -> None:
    """Check that the schema has every key; `+a.b=1` would otherwise be ignored.

    Raises:
        InputError: A key is unknown; names it and the nearest valid one.
    """
    path = path or []
    schema = schema_at(root, path)
    if schema is None and not holds_settings(root, path):
        return
    valid = [f.name for f in dataclasses.fields(schema)] if schema is not None else None
    for key in map(str, node):
        full = ".".join([*path, key])
        if valid is not None and key not in valid:
            raise InputError(unknown_key(full, valid, root))
        child = child_mapping(node, key)
        if child is not None:
            reject_unknown_keys(child, root, [*path, key])


def _check_values(node: DictConfig | ListConfig, path: str = "") -> None:
    """Build the settings of every group, innermost first, so that errors name the full key.

    Errors of the settings themselves name keys relative to their group.

    Raises:
        InputError: An illegal value.
    """
    kind = kind_of_items(node) if isinstance(node, ListConfig) else None
    for key, child in child_containers(node):
        inner = f"{path}[{key}]" if isinstance(key, int) else f"{path}.{key}".lstrip(".")
        if OmegaConf.is_interpolation(node, key):
            _check_interpolation(node, key, child, inner)
        if kind is not None and not dataclasses.is_dataclass(kind):
            raise InputError(wrong_item(inner, shown(OmegaConf.to_container(child)), kind.__name__))
        _check_values(child, inner)
    if path and dataclasses.is_dataclass(OmegaConf.get_type(node)):
        with under(path):
            OmegaConf.to_object(node)


def _check_interpolation(
    node: DictConfig | ListConfig, key: str | int, child: DictConfig | ListConfig, inner: str
) -> None:
    """Check that what stands in place of a mapping or list is one of the same kind.

    Raises:
        InputError: It is not.
    """
    value, hint = resolved(node, key), hint_at(node, key)
    if hint is not None and is_alike(hint, value):
        return
    if isinstance(value, DictConfig | ListConfig):
        if hint is None:
            return
        expected = f"values of the kind that {inner} has; write them out"
        raise InputError(f"{inner}={interpolation(node, key)}: expected {expected}")
    mapping = "values for its settings, or a mapping of names to values"
    expected = "a list in brackets" if isinstance(child, ListConfig) else mapping
    raise InputError(f"{inner}={shown(value)}: expected {expected}")


def load(cfg: DictConfig, schema: type[Settings]) -> Settings:
    """Convert the composed configuration to typed settings.

    Raises:
        InputError: An unknown key, a missing value, a wrong type or an illegal value.
    """
    reject_unknown_keys(cfg, schema)
    try:
        _check_values(cfg)
        settings = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        raise InputError(explain(error, schema)) from error
    assert isinstance(settings, schema)
    return settings


def load_job(verb: str, job: Job) -> Any:
    """Convert a job's configuration to the settings of its command, with the names of its results.

    Raises:
        InputError: As `load`.
    """
    schema = ROOTS[verb]
    load(job.config, schema)  # names are made of values that are known to be legal
    complete_names(verb, job)
    return load(job.config, schema)


def runs_in(arguments: Iterable[str]) -> str:
    """Return the folder `runs` that the arguments of a command name; `runs` without one.

    Raises:
        InputError: It is a sweep or an interpolation, as one folder holds the architectures that
            all jobs choose from.
    """
    runs = "runs"
    for argument in arguments:
        found = re.fullmatch(r"\+{0,2}runs=(.*)", argument, re.DOTALL)
        if found is None:
            continue
        try:
            override = OverridesParser.create().parse_override(argument)
        except HydraException:  # reported when Hydra reads it
            continue
        if override.is_sweep_override() or "${" in found[1]:
            raise InputError(f"{argument}: expected one folder for all jobs; give its path")
        value = override.value()
        if not isinstance(value, str | int | float) or value == "":
            raise InputError(f"{argument}: expected the path of a folder")
        runs = str(value)
    return runs


def _folders_in(arguments: Sequence[str]) -> Iterator[Path]:
    """Iterate over the folders of options that a command line adds."""
    for word, value in pairwise([*arguments, ""]):
        name, equals, folder = word.partition("=")
        if name in {"--config-dir", "-cd"}:
            yield Path(folder if equals else value)


def _prepare_folders() -> None:
    """Create the folder of found architectures, which Hydra reads, and check the user's options.

    Raises:
        InputError: An option of the user has the name of one of flash, or would call code.
    """
    runs = runs_in(sys.argv[1:])
    os.environ["FLASH_RUNS"] = str(Path(runs).resolve())
    Runs(Path(runs)).found_arch.mkdir(parents=True, exist_ok=True)
    check_own_options(Path("conf"))
    found = Runs(Path(runs)).found_arch.parent.resolve()
    for folder in _config_folders():
        if not folder.resolve().is_relative_to(CONF.resolve()):
            check_options(folder, Trust.values if folder == found else Trust.launcher)
    for folder in _folders_in(sys.argv[1:]):
        check_options(folder, Trust.launcher)
    if (CONF.parent / ".git").exists():  # users of a clone add their options to those of flash
        check_options(CONF, Trust.everything)


def _quiet_libraries() -> None:
    """Suppress messages of libraries that users of flash cannot act on."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("torchao").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*isinstance\\(treespec, LeafSpec\\).*")
    # A warning of Lightning on machines with Slurm; a single process needs no srun.
    warnings.filterwarnings("ignore", "The .srun. command is available")


@contextmanager
def one_line_errors(schema: type = object) -> Iterator[None]:
    """Convert errors that a user can correct to one line on stderr and an exit code.

    Args:
        schema: Root settings of the command, for errors of Hydra and OmegaConf.
    """
    with signals.as_ctrl_c(), _explained(schema, commands.this_command()):
        yield


@contextmanager
def _explained(schema: type, command: str) -> Iterator[None]:
    try:
        yield
        sys.stdout.flush()  # a reader that has ended is noticed here, not at the exit
    except InputError as error:
        _fail(str(error))
    except BrokenPipeError:  # the reader of the output has ended
        terminal.drop_output()
        sys.exit(1)
    except DeviceError as error:
        _fail(f"{error}; finished measurements are kept", 1)
    except (CheckFailed, ServiceError) as error:
        _fail(str(error), 1)
    except (HydraException, OmegaConfBaseException) as error:
        _fail(explain(error, schema))
    except yaml.MarkedYAMLError as error:  # a file of the user's own
        mark = error.problem_mark
        where = f"{mark.name}, line {mark.line + 1}" if mark else "a YAML file"
        _fail(f"{where}: {error.problem}; correct the file")
    except ModuleNotFoundError as error:
        line = explain_missing(error)
        if line is None:
            raise
        _fail(line)
    except OSError as error:
        if error.errno is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror}; finished work is kept, run the same command again", 1)
    except slurm.JobFailed as error:
        _fail(error.line, error.code)
    except KeyboardInterrupt:
        if is_main_process():
            with suppress(OSError):  # the terminal may be gone
                print(f"\nstopped; finished work is kept, go on with: {command}", file=sys.stderr)
        sys.exit(signals.exit_code())
    except Exception as error:
        if str(error).startswith("Config group override must be"):  # of Hydra, without the group
            _fail("a config group is null: expected the name of one of its options")
        number = os_error_number(error)
        if number is not None:
            _fail(f"{os.strerror(number)}; finished work is kept, run the same command again", 1)
        line = slurm.explain(error)
        if line is None:
            raise
        _fail(line, 1)


def entry(
    verb: str, job: Callable[[Any], object], check: Callable[[Any], object] = lambda settings: None
) -> None:
    """Run a command: compose its configuration, check it, convert it, call `job`, then exit.

    Args:
        verb: Name of the command, a key of `ROOTS`.
        job: Function of the settings that does the work.
        check: Function of the settings that raises the errors that `job` would raise before any
            work. With `-m` it is called for all jobs before the first one starts.
    """
    schema = ROOTS[verb]
    with one_line_errors(schema):
        _quiet_libraries()
        _prepare_folders()
    register()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints tracebacks of its own and exits 1

    def run(cfg: DictConfig) -> Outcome:
        errors = one_line_errors(schema)  # inside Hydra, which would otherwise add lines
        if slurm.in_job():
            _quiet_libraries()  # a job is a new process that starts here
            errors = slurm.job(errors)
        with sweep.job(errors):
            job(load_job(verb, this_job(cfg)))
        return noted()

    def run_all(multirun: Multirun) -> None:
        with one_line_errors(schema):
            jobs = sweep.Sweep(multirun)
            jobs.check_hydra(os.environ["FLASH_RUNS"])
            settings = [load_job(verb, job) for job in multirun.composed()]
            require_own_names(verb, settings)
            for each in settings:
                check(each)
            jobs.run(run)

    run_jobs_by(run_all)
    main = hydra.main(version_base="1.3", config_path=str(CONF), config_name=verb)
    with one_line_errors(schema):
        main(run)()


def _fail(message: str, code: int = 2) -> typing.NoReturn:
    if is_main_process():  # the other processes have the same error
        print(f"error: {printable(message)}", file=sys.stderr)
    raise slurm.CommandExit(message, code)
