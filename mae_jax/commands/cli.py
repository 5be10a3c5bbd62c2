"""The shared command-line code: flags, --help with an example, one line for a user's mistake, exit codes."""

import contextlib
import logging
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

import mae_jax
from mae_jax import plugins, presets, recipe_version
from mae_jax.commands import recipes
from mae_jax.errors import FINISHED, MISTAKE, UserError, explain
from mae_jax.runtime.discovery import has_accelerator, quiet_cuda, quiet_libtpu
from mae_jax.runtime.exit import exit_process
from mae_jax.runtime.memory import keep_freed

HELP = ("-h", "-?", *(dashes + name for dashes in ("-", "--") for name in ("help", "helpfull", "helpshort")))


def define_config() -> flags.FlagHolder[ConfigDict]:
    """Defines --config=recipe[:argument] and its --config.field=value overrides, once per process."""
    if "config" in flags.FLAGS:
        return flags.FlagHolder(flags.FLAGS, flags.FLAGS["config"])
    try:
        return config_flags.DEFINE_config_file("config", None, "recipe by name or path: quickstart[:argument], "
                                               "configs/quickstart.py; --config.FIELD=VALUE changes a field")
    except Exception as error:  # the definition reads the command line, and the files that --flagfile names
        _refuse(_one_line(error))


def run(command: Callable[[], int], usage: str | None, required: tuple[str, ...] = ()) -> None:
    """Parses the flags, runs `command` and exits with its code, or with the code of the error.

    Args:
      command: returns the exit code.
      usage: the text of --help, with a working example.
      required: flags that must be given.
    """
    def parse(argv: list[str]) -> list[str]:
        if "--version" in argv[1:]:
            show(version())
            sys.exit(FINISHED)
        asked = any(arg in HELP for arg in argv[1:])
        rest = _parsed([arg for arg in argv if arg not in HELP])
        if asked:
            show(_help(command.__module__, usage))
            sys.exit(FINISHED)
        missing = [f"--{name}" for name in required if not flags.FLAGS[name].value]
        if missing:
            _refuse(f"{' and '.join(missing)} must be given; --help shows an example")
        if len(rest) > 1:
            _refuse(f"unexpected argument {rest[1]!r}; flags start with --")
        return rest

    try:
        app.run(lambda _: exit_process(guarded(command)), flags_parser=parse)
    except KeyboardInterrupt:  # before the command started
        _end(explain(KeyboardInterrupt()))


def _parsed(argv: list[str]) -> list[str]:
    """Parses the flags and loads the recipe; returns the remaining arguments. Ends the process at a mistake."""
    try:
        argv = [*argv[:1], *flags.FLAGS.read_flags_from_files(argv[1:], force_gnu=False)]
        with presets.given(recipes.overridden(argv)):
            rest = flags.FLAGS(recipes.with_paths(argv) if "config" in flags.FLAGS else argv)
        if "config" in flags.FLAGS:
            config = flags.FLAGS.config  # a missing config file fails only at this access
            plugins.load(config.get("plugins", ()) if config is not None else (), "--config")
    except (SystemExit, BrokenPipeError):
        if not any("helpxml" in arg for arg in argv):  # for --helpxml absl prints its help and exits
            _refuse("the config file, or a plug-in of it, ends the process")
        _flush()
        sys.exit(FINISHED)
    except Exception as error:
        _refuse(_one_line(error))
    return rest


def version() -> str:
    """Returns the text that --version prints."""
    return f"mae_jax {mae_jax.__version__}"


def show(text: str) -> None:
    """Prints the last text of a command; ignores a closed pipe."""
    with contextlib.suppress(OSError):
        print(text)
    _flush()


def _help(module: str, usage: str | None) -> str:
    """Returns the text of --help: the usage, the flags of the command and, with --config, the fields of the recipe."""
    about = [usage or "", "Flags:"]
    about += filter(None, map(flags.FLAGS.module_help, (module, __name__, "mae_jax.runtime.launch")))
    if "config" in flags.FLAGS and flags.FLAGS.config is None:
        about += ["", "The fields of a recipe: --config=quickstart --help.", f"Recipes: {', '.join(recipes.names())}"]
    elif "config" in flags.FLAGS:
        about += ["", "Fields of this recipe; --config.FIELD=VALUE changes one:", recipes.fields(flags.FLAGS.config)]
    return "\n".join(about)


class _OnStderr(logging.StreamHandler):
    """Logs to the current `sys.stderr`, which a live progress line replaces to have output written above it."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def quiet_logs() -> None:
    """Logs INFO lines of mae_jax and warnings of the libraries to stderr."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    handler = _OnStderr()
    handler.setFormatter(logging.Formatter("%(message)s"))
    ours = logging.getLogger("mae_jax")
    ours.setLevel(logging.INFO)
    ours.addHandler(handler)
    ours.propagate = False


def guarded(command: Callable[[], int]) -> int:
    """Runs the command and maps an exception to an exit code; only a bug of mae_jax shows a traceback."""
    quiet_logs()
    quiet_libtpu(os.environ)
    quiet_cuda(os.environ)
    if not has_accelerator(os.environ):
        keep_freed(os.environ)
    try:
        code = command()
    except (Exception, KeyboardInterrupt) as error:
        code, text = explain(error)
        with contextlib.suppress(OSError):
            print(text, file=sys.stderr)
    _flush()
    return code


def _flush() -> None:
    """Flushes standard output; drops the rest if that fails, since Python would otherwise exit with 120."""
    if sys.stdout is None:  # closed before Python started
        return
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _one_line(error: Exception) -> str:
    """Returns one line about an error in the flags or in the config file."""
    while error.args and isinstance(error.args[0], Exception):  # ml_collections wraps a KeyError in an AttributeError
        error = error.args[0]
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    line = " ".join(text.split())
    if "Traceback" in text:  # ml_collections passes an exception of the config file on as its traceback
        return f"the config file does not load: {text.strip().splitlines()[-1]}"
    if isinstance(error, flags.Error | UserError):
        return line.removeprefix("ERROR:: ")
    if isinstance(error, OSError):
        return _no_config(line)
    if isinstance(error, KeyError):
        return _unknown_field(line)
    known = isinstance(error, AttributeError | TypeError | ValueError)
    return line if known else f"the config file does not load: {type(error).__name__}: {line}"


def _unknown_field(line: str) -> str:
    """Rewrites ml_collections' message about an unknown field; for a former name, gives the present one."""
    unknown = re.search(r'instead of "(.+?)"|Key "(.+?)" does not exist', line) or re.fullmatch(r"'(\w+)'", line)
    former = recipe_version.former(next(filter(None, unknown.groups()))) if unknown else ""
    if former:
        return f"unknown config field; {former}"
    if found := re.search(r'Did you mean "(.+)" instead of "(.+)"', line):
        return f"unknown config field {found[2]!r}; did you mean {found[1]!r}?"
    return f"unknown config field {line}" if re.fullmatch(r"'\w+'", line) else line


def _no_config(line: str) -> str:
    """Returns the reason why the config file cannot be read, and the file in its folder with the most similar name."""
    found = re.search(r"\[Errno \d+\] (.+?): '(.+?)'", line)
    if not found:
        return f"the config file does not load: {line}"
    reason, path = found[1], Path(found[2])
    beside = [file.stem for file in path.parent.glob("*.py")]
    return f"cannot read the config file {path}: {reason.lower()}; {recipes.alike(path.stem, beside)}"


def _refuse(line: str) -> NoReturn:
    _end((MISTAKE, f"error: {line}"))


def _end(how: tuple[int, str]) -> NoReturn:
    code, line = how
    print(line, file=sys.stderr)
    sys.stderr.flush()
    os._exit(code)  # absl would print a traceback and exit 1
