"""trefoil completion"""

from __future__ import annotations

import contextlib
import importlib
import io
import re
from dataclasses import dataclass
from typing import Annotated

import tyro

from pipeline.cli import VERBS
from pipeline.cli.common import finish, parse
from pipeline.errors import ConfigError, unknown

DESCRIPTION = """Print a script that completes verbs, flags and file names in a shell.

Example:  eval "$(trefoil completion bash)"  in ~/.bashrc, or with zsh in ~/.zshrc"""

SHELLS = ("bash", "zsh")


@dataclass(frozen=True, kw_only=True)
class Args:
    shell: Annotated[str, tyro.conf.Positional] = "bash"
    """bash or zsh."""
    json: bool = False
    """Print the result as JSON."""
    quiet: bool = False
    """Print nothing but errors, and with --json the result."""


def main(argv: list[str]) -> int:
    args = parse(Args, argv, verb="completion", description=DESCRIPTION)
    if args.shell not in SHELLS:
        raise ConfigError(unknown("shell", args.shell, SHELLS))
    text = script(args.shell)
    if not args.json and not args.quiet:
        print(text, end="")
    return finish({"shell": args.shell, "script": text}, args.json)


def script(shell: str) -> str:
    """The script; flags are those that `trefoil VERB --help` shows now."""
    cases = "\n".join(f'    {verb}) flags="{" ".join(flags(verb))}" ;;' for verb in VERBS)
    begin = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    return f"""{begin}_trefoil() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" flags=""
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{" ".join(VERBS)} --help --version" -- "$word"))
    return
  fi
  case "${{COMP_WORDS[1]}}" in
{cases}
  esac
  case "$word" in
    -*) COMPREPLY=($(compgen -W "$flags" -- "$word")) ;;
    *) COMPREPLY=($(compgen -f -- "$word")) ;;
  esac
}}
complete -o filenames -F _trefoil trefoil
"""


def flags(verb: str) -> list[str]:
    """The long flags of a verb, in the order of its help."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        importlib.import_module(f"pipeline.cli.{verb}").main(["--help"])
    return list(dict.fromkeys(re.findall(r"(?<![\w-])--[a-z][a-z0-9.-]*[a-z0-9]", shown.getvalue())))
