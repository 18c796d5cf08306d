"""Completion of the command line: scripts for shells, and the words that they ask for.

A script calls `flash --complete WORD...` with the words so far, the last one being the word under
the cursor, and gets one candidate a line. Candidates that end in '=' or '.' go on.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from flash.config_reference import GROUPS, enums, keys
from flash.help import groups, options, runs_folder
from flash.schemas import ROOTS

_BASH = """\
# Completion of flash for bash: source this, or put it into
# ~/.local/share/bash-completion/completions/flash
_flash() {
  local line="${COMP_LINE:0:COMP_POINT}" words word start
  read -ra words <<< "$line"
  [[ $line == *[[:space:]] ]] && words+=("")
  word="${words[-1]}"
  mapfile -t COMPREPLY < <("${words[0]}" --complete "${words[@]:1}" 2>/dev/null)
  if [[ $word == *=* && $COMP_WORDBREAKS == *=* ]]; then  # bash sees the rest only
    start="${word%"${word##*=}"}"
    COMPREPLY=("${COMPREPLY[@]#"$start"}")
  fi
  [[ ${#COMPREPLY[@]} -eq 1 && $COMPREPLY == *[=.] ]] && compopt -o nospace
}
complete -o default -F _flash flash"""
_ZSH = """\
# Completion of flash for zsh: source this after compinit.
_flash() {
  local -a found
  found=("${(@f)$("${words[1]}" --complete "${(@)words[2,CURRENT]}" 2>/dev/null)}")
  if [[ -n "$found" ]]; then
    compadd -Q -S '' -- "${(@M)found:#*[=.]}"
    compadd -Q -- "${(@)found:#*[=.]}"
  else
    _files
  fi
}
compdef _flash flash"""
_FISH = """\
# Completion of flash for fish: source this, or put it into
# ~/.config/fish/completions/flash.fish
complete -c flash -a '(flash --complete (commandline -opc)[2..-1] (commandline -ct) 2>/dev/null)'"""
SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}
"""Script of each shell."""
_FLAGS = ["--help", "--cfg", "-m"]
_OTHERS = {
    "measurements": ["export", "merge", "--runs", "--help"],
    "report": ["--study", "--runs", "--wandb", "--help"],
    "convert": ["--help"],
    "new": ["--from", "--backbone", "--help"],
    "completion": sorted(SCRIPTS),
}
"""Words of the commands that are not configured by Hydra."""


def complete(words: Sequence[str]) -> list[str]:
    """Candidates for the last of the words that follow `flash`."""
    *before, word = words or [""]
    if not before:
        return _beginning([*ROOTS, *_OTHERS, "--help", "--version"], word)
    verb = before[0]
    if verb in ROOTS:
        return _beginning(_configured(verb, before[1:], word), word)
    return _beginning(_other(verb, before[1:]), word)


def _beginning(candidates: Iterable[str], word: str) -> list[str]:
    return sorted({each for each in candidates if each.startswith(word)})


def _other(verb: str, before: Sequence[str]) -> Iterable[str]:
    """Words of a command that takes plain arguments."""
    if before[-1:] == ["--study"]:
        return [path.name for path in Path("runs", "studies").glob("*")]
    if verb == "new":
        if not before:
            return [name for name, schema in GROUPS.items() if schema is not None]
        if before[-1] == "--from":
            return [path for verb in ROOTS for path in options(verb, before[0])]
        if before[-1] == "--backbone":
            return []
    return _OTHERS.get(verb, [])


def _configured(verb: str, before: Sequence[str], word: str) -> Iterator[str]:
    """Words of a command that Hydra configures."""
    if word.startswith("-"):
        yield from _FLAGS
    elif before[-1:] == ["--cfg"]:
        yield "job"
    elif {"-h", "--help"} & set(before):
        yield from groups(verb)
    elif "=" in word:
        key, _, values = word.partition("=")
        start = word[: len(word) - len(values.rpartition(",")[2])]  # of a sweep: the last value
        yield from (f"{start}{value}" for value in _values(verb, key, before))
    else:
        yield from _keys(verb, word)


def _values(verb: str, key: str, before: Sequence[str]) -> Iterable[str]:
    """Options of a group, or values of a setting that has a few."""
    name, runs = key.lstrip("+"), runs_folder(before)
    if name in groups(verb):
        return options(verb, name, runs)
    if name == "model":
        return [path.name for path in (runs / "models").glob("*")]
    root = name.partition(".")[0]
    schema, prefix = GROUPS.get(root), f"{root}."
    if root not in groups(verb) or schema is None:
        schema, prefix = ROOTS[verb], ""
    for known in keys(schema, prefix):
        if known.path == name:
            members = [name for enum in enums(known.annotation) for name in enum.__members__]
            return members or (["true", "false"] if known.annotation is bool else [])
    return []


def _keys(verb: str, word: str) -> Iterator[str]:
    """Groups and settings; within a group, one level of keys at a time."""
    sign, name = ("+", word[1:]) if word.startswith("+") else ("", word)
    listed = groups(verb)
    if "." not in name:
        for group in listed:
            mark = "+" if group == "arch" else sign
            yield f"{mark}{group}="
            if GROUPS[group] is not None:
                yield f"{mark}{group}."
        for key in keys(ROOTS[verb], ""):
            if "." not in key.path and key.path not in listed:
                yield f"{sign}{key.path}="
        return
    root = name.partition(".")[0]
    schema = GROUPS.get(root)
    if root not in listed or schema is None:
        return
    depth = name.count(".") + 1
    for key in keys(schema, f"{root}."):
        parts = key.path.split(".")
        whole = ".".join(parts[:depth])
        yield f"{sign}{whole}{'.' if len(parts) > depth else '='}"
