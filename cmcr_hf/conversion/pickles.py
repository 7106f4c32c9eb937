"""Read pickles as data: no name in one is looked up, nothing is called, and what it would make is only described."""

from __future__ import annotations

import pickletools
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

# Steps of a pickle that give their argument as it stands.
VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
    *("SHORT_BINSTRING", "BINSTRING"),
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


@dataclass
class Name:
    """A name that a pickle gives, such as `torch FloatStorage`."""

    name: str


@dataclass
class Call:
    """What a pickle would make by calling a name, and the state that it would then give it."""

    name: str
    arguments: tuple
    state: Any = None


@dataclass
class Outside:
    """What a pickle leaves to its reader to find, by an id."""

    id: Any


def read_pickle(data: bytes, names: Collection[str], *, max_steps: int) -> Any:
    """Return what a pickle says, with `Call` and `Outside` in place of all that loading it would make.

    Dicts have texts and whole numbers for keys; what makes an `OrderedDict` is a dict here.

    Args:
        names: that it may give, as `module name`.

    Raises:
        ValueError: it gives another name, takes a step that weights and arrays do not need, or more than `max_steps`.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        mark = marks.pop()
        values = stack[mark:]
        del stack[mark:]
        return values

    argument: Any
    try:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if number == max_steps:
                raise ValueError(f"expected a pickle of at most {max_steps} steps, got more. Do not load it.")
            match opcode.name:
                case "PROTO" | "FRAME":
                    pass
                case "STOP":
                    return stack[-1]
                case "MARK":
                    marks.append(len(stack))
                case name if name in VALUES:
                    stack.append(argument)
                case name if name in CONSTANTS:
                    stack.append(CONSTANTS[name])
                case "EMPTY_LIST":
                    stack.append([])
                case "EMPTY_DICT":
                    stack.append({})
                case "TUPLE":
                    stack.append(tuple(since_mark()))
                case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                    stack[-int(name[-1]) :] = [tuple(stack[-int(name[-1]) :])]
                case "APPEND" | "APPENDS" as name:
                    items = [stack.pop()] if name == "APPEND" else since_mark()
                    _extend(stack[-1], items)
                case "SETITEM" | "SETITEMS" as name:
                    items = [stack.pop(-2), stack.pop()] if name == "SETITEM" else since_mark()
                    _update(stack[-1], items)
                case "PUT" | "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "GET" | "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "GLOBAL" | "INST":
                    stack.append(_name(argument, names))
                case "STACK_GLOBAL":
                    stack.append(_name(" ".join([stack.pop(-2), stack.pop()]), names))
                case "BINPERSID":
                    stack.append(Outside(stack.pop()))
                case "REDUCE" | "NEWOBJ":
                    arguments, called = stack.pop(), stack.pop()
                    empty = called.name == "collections OrderedDict" and arguments == ()
                    stack.append({} if empty else Call(called.name, arguments))
                case "BUILD":
                    state = stack.pop()
                    # Of a dict, what torch keeps beside the weights.
                    if not isinstance(stack[-1], dict):
                        stack[-1].state = state
                case name:
                    raise ValueError(f"its pickle takes the step {name}, which weights do not need. Do not load it.")
    except (AttributeError, LookupError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"its pickle is damaged ({error!s:.200}). Download it again.") from error
    except ValueError as error:
        # Those of pickletools speak of its own arguments.
        if str(error).endswith(("Do not load it.", "Download it again.")):
            raise
        raise ValueError(f"its pickle is damaged ({error!s:.200}). Download it again.") from error
    raise ValueError("its pickle has no end. Download it again.")


def _extend(values: Any, items: list[Any]) -> None:
    if not isinstance(values, list):
        raise TypeError("items for what is no list")
    values.extend(items)


def _update(values: Any, items: list[Any]) -> None:
    # Any other key is hashed, which a tuple of tuples, each twice in the next, would make take forever.
    if not isinstance(values, dict) or not all(isinstance(key, str | int) for key in items[::2]):
        raise TypeError("keys that are no texts")
    values.update(zip(items[::2], items[1::2], strict=True))


def _name(name: str, names: Collection[str]) -> Name:
    if name not in names:
        raise ValueError(
            f"its pickle names {name.replace(' ', '.')!r:.200}, which weights do not need. Do not load it."
        )
    return Name(name)
