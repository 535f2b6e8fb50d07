"""What Typer sees of a command: its options, those that all commands have, and names in the environment."""

import inspect
from collections.abc import Callable, Mapping
from copy import copy
from typing import Annotated, Any, get_args

from typer.models import OptionInfo

_PREFIX = "MOEMERGE"


def complete_signature(
    function: Callable[..., None], command: str, common: Mapping[str, Any]
) -> inspect.Signature:
    """The signature of a command with what it need not say.

    An option without a name in the environment gets one from its first long name: `--max-batch` of `serve`
    is MOEMERGE_SERVE_MAX_BATCH. Help does not repeat that rule at every option.

    Args:
        function: The command.
        command: Its shown name.
        common: Flags that all commands have, by parameter; those that it declares itself stay.
    """
    signature = inspect.signature(function, eval_str=True)
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=option)
        for name, option in common.items()
        if name not in signature.parameters
    ]
    return signature.replace(
        parameters=[_with_environment(each, command) for each in (*signature.parameters.values(), *added)]
    )


def _with_environment(parameter: inspect.Parameter, command: str) -> inspect.Parameter:
    kind, *extras = get_args(parameter.annotation) or (None,)
    if not extras or not isinstance(extras[0], OptionInfo) or extras[0].envvar:
        return parameter
    option = copy(extras[0])
    option.envvar = f"{_PREFIX}_{command}_{_long_name(option, parameter.name)}".replace("-", "_").upper()
    option.show_envvar = False
    return parameter.replace(annotation=Annotated[kind, option])


def _long_name(option: OptionInfo, parameter: str) -> str:
    """The first name with two dashes; Typer keeps the first of all in `default` inside of `Annotated`."""
    declared = [name for name in (option.default, *(option.param_decls or ())) if isinstance(name, str)]
    return next((name[2:].split("/")[0] for name in declared if name.startswith("--")), parameter)
