"""The ``--flash-comm-*`` flags, made from the fields of Config, and every other door by which a setting comes in.

**Flags.** Megatron builds its parser in ``megatron.training.arguments.add_megatron_arguments``, which every
``parse_args`` looks up at call time. Importing this package waits for that module (when_imported.py) and wraps the one
function, so our group stands in Megatron's own ``--help`` and argument dump. Any other script calls
:func:`add_arguments`. ``--flash-comm-bits`` is an argparse action that switches flash-comm on when, and only when, the
flag is given. The other options are read from the same namespace after parsing, so their order does not matter. A
combination that no recipe knows ends the program with one sentence and exit code 2, like any other wrong flag.

**Finished arguments**: from ``--yaml-cfg``, ``set_defaults``, a program, a Ray driver. Megatron and its callers hand
them to ``megatron.training.global_vars.set_args``, which we wrap: what they say is put in force, and where they say
nothing, they are made to say what is in force.

**FLASH_COMM_BITS** (with FLASH_COMM_FEEDBACK), for programs without arguments of Megatron's: in force from
``megatron.core.parallel_state.initialize_model_parallel`` on, unless something else was before.
"""

from __future__ import annotations

import argparse
import os
import sys
import typing
from collections.abc import Callable
from dataclasses import Field, fields
from functools import partial
from typing import Any

from ..config import PREFIX, Config, check_environment, current, finish, from_environment, is_disabled, set_current
from ..observe import messages
from . import installation, patching
from .patching import Function, PatchError, Seam
from .when_imported import when_imported

MEGATRON_ARGUMENTS = "megatron.training.arguments"


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the group "flash-comm" to ``parser`` and return it, as Megatron's ``extra_args_provider`` wants.

    Harmless when the group is there already. Without ``--flash-comm-bits`` on the command line nothing changes.
    """
    if any(group.title == "flash-comm" for group in parser._action_groups):
        return parser
    group = parser.add_argument_group("flash-comm", "quantized tensor-parallel communication")
    kinds = typing.get_type_hints(Config)
    for field in fields(Config):
        group.add_argument(_flag(field.name), dest=PREFIX + field.name, default=None, **_how(field, kinds[field.name]))
    parser.parse_known_args = partial(_parse, parser, parser.parse_known_args)  # type: ignore[method-assign]
    return parser


def config_from(namespace: argparse.Namespace) -> Config | None:
    """The configuration a namespace asks for; None without bits. ValueError for an option that does not exist."""
    names = {PREFIX + field.name for field in fields(Config)}
    unknown = next((name for name in vars(namespace) if name.startswith(PREFIX) and name not in names), None)
    if unknown is not None:
        raise ValueError(f"{unknown} is no option of flash-comm: choose {', '.join(sorted(names))}.")
    options = {field.name: getattr(namespace, PREFIX + field.name, None) for field in fields(Config)}
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if given and "bits" not in given:
        raise ValueError(f"{_flag(next(iter(given)))} does nothing without {_flag('bits')}: add {_flag('bits')} 4.")
    return Config(**given) if given else None


def enable_from(namespace: argparse.Namespace) -> None:
    """Make finished arguments and what is in force agree: switch on as ``namespace`` says, or write down what is on.

    Raises what :func:`enable` raises.
    """
    config = config_from(namespace)
    if config is None:
        enable_from_environment()
    elif config != current():
        installation.switch_on(config)
    found = current()
    for field in fields(Config) if found is not None and not is_disabled() else ():
        setattr(namespace, PREFIX + field.name, getattr(found, field.name))
    finish(namespace)


def enable_from_environment() -> None:
    """Switch on as FLASH_COMM_BITS says, if it is set and nothing is on yet."""
    options = from_environment()
    if options and current() is None:
        installation.switch_on(Config(**options), ", as FLASH_COMM_BITS says")
    elif options and current() != Config(**options) and not is_disabled():
        messages.say("flash-comm: FLASH_COMM_BITS is not used, for a flag or a call of enable() came first.")


class _SwitchOn(argparse.Action):
    """Stores a value and patches Megatron; the configuration is made when it is first asked for."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: Any = None) -> None:
        setattr(namespace, self.dest, values if self.nargs is None else True)
        if getattr(namespace, f"{PREFIX}bits", None) is not None:
            set_current(partial(config_from, namespace))  # type: ignore[arg-type]
            experts = bool(getattr(namespace, f"{PREFIX}experts", None))
            _or_exit(parser, partial(installation.install, experts))


def _parse(parser: argparse.ArgumentParser, parse: Callable[..., Any], args: Any = None, namespace: Any = None) -> Any:
    """``parse_known_args`` of one parser, then the checks that need all options together."""
    namespace, unknown = parse(args, namespace)
    _or_exit(parser, check_environment)
    _or_exit(parser, partial(config_from, namespace))
    if getattr(namespace, f"{PREFIX}bits", None) is not None:  # by the flag, by a default, by a namespace handed in
        config = config_from(namespace)
        if config is not None and config != current():
            _or_exit(parser, partial(installation.switch_on, config))
    return namespace, unknown


def _or_exit(parser: argparse.ArgumentParser, check: Callable[[], Any]) -> None:
    """Run ``check``; what it refuses is one sentence and exit code 2, without Megatron's pages of usage."""
    try:
        check()
    except (ValueError, PatchError) as error:
        installation.uninstall()
        set_current(None)
        parser.exit(2, f"{parser.prog}: error: {error}\n")


def _flag(name: str) -> str:
    return "--" + (PREFIX + name).replace("_", "-")


def _how(field: Field[Any], kind: Any) -> dict[str, Any]:
    """argparse's keywords for one field."""
    help = field.metadata["help"]
    if kind is bool:
        action = {"action": _SwitchOn, "nargs": 0} if field.name == "experts" else {"action": "store_true"}
        return {"help": help} | action
    kinds = {kind, *typing.get_args(kind)}
    convert = next((each for each in (int, float) if each in kinds), str)
    how: dict[str, Any] = {"type": convert, "metavar": "NAME" if convert is str else "N", "help": help}
    return how | ({"action": _SwitchOn} if field.name == "bits" else {})


# ---- Megatron's own functions ---------------------------------------------------------------------------------------


def _with_flags(original: Function) -> Function:
    def add_megatron_arguments(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> argparse.ArgumentParser:
        return add_arguments(original(parser, *args, **kwargs))

    return add_megatron_arguments


def _with_enable(original: Function) -> Function:
    def set_args(args: Any, *more: Any, **kwargs: Any) -> Any:
        if args is not None:
            enable_from(args)
        return original(args, *more, **kwargs)

    return set_args


def _with_environment(original: Function) -> Function:
    def initialize_model_parallel(*args: Any, **kwargs: Any) -> Any:
        enable_from_environment()
        return original(*args, **kwargs)

    return initialize_model_parallel


FLAG = Seam(MEGATRON_ARGUMENTS, "add_megatron_arguments", ("parser",), _with_flags,
            "adds our flags to Megatron's parser; every parse_args since 0.12 looks it up at call time")  # fmt: skip
FINISHED = Seam("megatron.training.global_vars", "set_args", ("args",), _with_enable,
                "finished arguments pass here, whoever made them; its module calls it by this name")  # fmt: skip
VARIABLE = Seam("megatron.core.parallel_state", "initialize_model_parallel", ("tensor_model_parallel_size",),
                _with_environment, "every program calls it before it builds a model")  # fmt: skip
SEAMS = (FLAG, FINISHED)


def install() -> None:
    """Open the doors as soon as the script imports Megatron's modules; at once if it has."""
    when_imported(MEGATRON_ARGUMENTS, _patch_parser)
    instead = "call flashcomm_megatron.enable() on every rank."
    when_imported(FINISHED.module, partial(patching.apply_late, FINISHED, instead))
    if "FLASH_COMM_BITS" in os.environ:
        when_imported(VARIABLE.module, partial(patching.apply_late, VARIABLE, instead))


def _patch_parser() -> None:
    parser = getattr(sys.modules[MEGATRON_ARGUMENTS], "add_megatron_arguments", None)
    if "flashcomm_megatron" in getattr(getattr(parser, "__code__", None), "co_names", ()):
        return  # it asks us for the flags by itself: a Megatron with one of patches/ applied
    patching.apply_late(FLAG, "pass extra_args_provider=flashcomm_megatron.add_arguments.")
