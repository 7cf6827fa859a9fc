"""The ``--flash-comm-*`` flags, made from the fields of Config, and how they reach a script nobody edited.

Megatron builds its parser in ``megatron.training.arguments.add_megatron_arguments``, which every ``parse_args``
looks up at call time. Importing this package waits for that module (when_imported.py) and wraps the one function,
so our group stands in Megatron's own ``--help`` and argument dump. Any other script calls :func:`add_arguments`.

``--flash-comm-bits`` is an argparse action that switches flash-comm on when, and only when, the flag is given. The
other options are read from the same namespace after parsing, so their order does not matter; a combination that no
recipe knows ends the program with one sentence and exit code 2, like any other wrong flag.
"""

from __future__ import annotations

import argparse
import logging
import sys
import typing
from collections.abc import Callable
from dataclasses import Field, fields
from functools import partial
from typing import Any

from .. import environment
from ..config import Config, current, set_current
from . import patching, seams
from .patching import PatchError, Seam
from .when_imported import when_imported

logger = logging.getLogger(__name__)
PREFIX = "flash_comm_"
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
    """The configuration a parsed command line asks for; None without bits. ValueError if no recipe knows it."""
    options = {field.name: getattr(namespace, PREFIX + field.name, None) for field in fields(Config)}
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if given and "bits" not in given:
        raise ValueError(f"{_flag(next(iter(given)))} does nothing without {_flag('bits')}: add {_flag('bits')} 4.")
    return Config(**given) if given else None


def enable_from(namespace: argparse.Namespace) -> None:
    """Switch on as ``namespace`` says, if it does and parsing has not: it may come from a YAML file or a program.

    Raises what :func:`api.enable` raises.
    """
    config = config_from(namespace)
    if config is not None and config != current():
        set_current(config)
        seams.install()


class _SwitchOn(argparse.Action):
    """Stores the width and patches Megatron; the configuration is made when it is first asked for."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: Any = None) -> None:
        setattr(namespace, self.dest, values)
        set_current(partial(config_from, namespace))  # type: ignore[arg-type]
        _or_exit(parser, seams.install)


def _parse(parser: argparse.ArgumentParser, parse: Callable[..., Any], args: Any = None, namespace: Any = None) -> Any:
    """``parse_known_args`` of one parser, then the checks that need all options together."""
    namespace, unknown = parse(args, namespace)
    _or_exit(parser, environment.check)
    _or_exit(parser, partial(config_from, namespace))
    if getattr(namespace, f"{PREFIX}bits", None) is not None:
        current()
    return namespace, unknown


def _or_exit(parser: argparse.ArgumentParser, check: Callable[[], Any]) -> None:
    """Run ``check``; what it refuses is one sentence and exit code 2, without Megatron's pages of usage."""
    try:
        check()
    except (ValueError, PatchError) as error:
        seams.uninstall()
        set_current(None)
        parser.exit(2, f"{parser.prog}: error: {error}\n")


def _flag(name: str) -> str:
    return "--" + (PREFIX + name).replace("_", "-")


def _how(field: Field[Any], kind: Any) -> dict[str, Any]:
    """argparse's keywords for one field."""
    help = field.metadata["help"]
    if kind is bool:
        return {"action": "store_true", "help": help}
    kinds = {kind, *typing.get_args(kind)}
    convert = next((each for each in (int, float) if each in kinds), str)
    how: dict[str, Any] = {"type": convert, "metavar": "NAME" if convert is str else "N", "help": help}
    return how | ({"action": _SwitchOn} if field.name == "bits" else {})


# ---- Megatron's own parser ----------------------------------------------------------------------------------------


def _with_flags(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_megatron_arguments(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> argparse.ArgumentParser:
        return add_arguments(original(parser, *args, **kwargs))

    return add_megatron_arguments


FLAG = Seam(MEGATRON_ARGUMENTS, "add_megatron_arguments", ("parser",), _with_flags,
            "adds our flags to Megatron's parser; every parse_args since 0.12 looks it up at call time")  # fmt: skip


def install() -> None:
    """Put the flags into Megatron's parser as soon as the script imports it; at once if it has."""
    when_imported(MEGATRON_ARGUMENTS, _patch_parser)


def _patch_parser() -> None:
    parser = getattr(sys.modules[MEGATRON_ARGUMENTS], "add_megatron_arguments", None)
    if "flashcomm_megatron" in getattr(getattr(parser, "__code__", None), "co_names", ()):
        return  # it asks us for the flags by itself: a Megatron with one of patches/ applied
    try:
        patching.apply([FLAG])
    except PatchError as error:
        logger.warning("%s\nUntil then pass extra_args_provider=flashcomm_megatron.add_arguments.", error)
