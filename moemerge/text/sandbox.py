"""A jinja2 sandbox in which a template can neither reach out nor go on for ever.

jinja2's own sandbox keeps templates from attributes that lead out of it. This one also has a budget for each
rendering: loops, calls, operators and filters pay a step each and for the sizes they handle. Knows nothing
of chats.
"""

import functools
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from typing import Any

from jinja2 import Template, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_STEPS = 500_000
MAX_LENGTH = 2**24
_LARGEST_EXPONENT = 64
_CHARACTERS_PER_STEP = 256
_ITEMS_PER_STEP = 16
# A width of many digits, or one taken from an argument.
_WIDE = re.compile(r"%[^%a-zA-Z]*(\*|\d{6,})|:[^{}]*(\d{6,}|\{)")


_WIDENING = ("center", "ljust", "rjust", "zfill", "batch", "slice")
_MULTIPLYING = ("expandtabs", "indent", "wordwrap", "join")


class BoundedSandbox(ImmutableSandboxedEnvironment):
    """Compiles templates that render within a budget."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(
        self,
        *,
        extensions: Sequence[str | type[Extension]],
        filters: Mapping[str, Callable[..., Any]],
        functions: Mapping[str, Callable[..., Any]],
    ) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=extensions,
            finalize=self._shown,
            # Nothing is computed before there is a budget.
            optimized=False,
        )
        self._budget = threading.local()
        everything = {**self.filters, **filters}
        self.filters = {name: self._counted_filter(name, function) for name, function in everything.items()}
        self.filters |= {"_counted": self._counted, "_joined": self._joined}
        self.globals |= {"namespace": _Namespace, "dict": _make_dict, **functions}
        del self.globals["lipsum"]

    def compile_template(self, source: str) -> Template:
        """A template whose loops are counted.

        Raises:
            jinja2.TemplateError, RecursionError: It is not a template.
        """
        tree = _CountLoops().visit(self.parse(source))
        tree.set_environment(self)
        return self.from_string(tree)

    @contextmanager
    def budget(self, steps: int = MAX_STEPS) -> Iterator[None]:
        """What is rendered inside, by this thread, may take so many steps."""
        self._budget.left = steps
        try:
            yield
        finally:
            self._budget.left = 0

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call something from a template."""
        arguments = [*args, *kwargs.values()]
        method = getattr(__obj, "__wrapped__", __obj)
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str | list | tuple | dict):
            __self._spend_on(method.__name__, owner, arguments)
        __self._spend(1 + sum(map(_weight, arguments)))
        result = super().call(__context, __obj, *args, **kwargs)
        __self._spend(_weight(result))
        return result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Apply an operator that can make something large of something small."""
        self._spend(1 + _weight(left) + _weight(right))
        if operator == "**" and isinstance(right, int) and right > _LARGEST_EXPONENT:
            raise SecurityError(f"it raises a number to the power of {right}")
        if operator == "%" and isinstance(left, str):
            self._spend_on("format", left, [right])
        if operator == "*":
            for sized, times in ((left, right), (right, left)):
                if isinstance(sized, Sized) and isinstance(times, int):
                    self._spend_characters(len(sized) * times)
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, int) and result.bit_length() > 2**12:
            raise SecurityError("it computes with too large a number")
        self._spend(_weight(result))
        return result

    def _spend(self, steps: int) -> None:
        self._budget.left = getattr(self._budget, "left", 0) - steps
        if self._budget.left < 0:
            raise SecurityError("it takes too many steps")

    def _spend_characters(self, count: int) -> None:
        if count > MAX_LENGTH:
            raise SecurityError(f"it makes a text of {count} characters")
        self._spend(count // _CHARACTERS_PER_STEP)

    def _spend_on(self, name: str, value: Any, arguments: Sequence[Any]) -> None:
        """Pay for what a method or filter is about to make, if its arguments can make that large."""
        if name in ("format", "format_map") and _WIDE.search(str(value)):
            raise SecurityError("it formats with too large a width")
        if name in ("join", "format", "format_map", "tojson", "string", "pprint"):
            self._spend_characters(_deep_size([value, *arguments]))
        length = len(value) if isinstance(value, Sized) else 1
        if name == "replace" and len(arguments) > 1:
            old, new = str(arguments[0]), str(arguments[1])
            self._spend_characters(length + str(value).count(old) * len(new))
        elif name in _WIDENING or name in _MULTIPLYING:
            numbers = [abs(n) for n in arguments if isinstance(n, int)]
            most = max([1, *numbers, *(len(text) for text in arguments if isinstance(text, str))])
            self._spend_characters(length * most if name in _MULTIPLYING else length + most)

    def _counted_filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        # Filters that jinja2 hands a context have one argument more.
        begin = int(hasattr(function, "jinja_pass_arg"))

        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            value, *arguments = args[begin:] or [None]
            self._spend_on(name, value, [*arguments, *kwargs.values()])
            self._spend(1 + _weight(value))
            result = function(*args, **kwargs)
            self._spend(_weight(result))
            return result

        return counted

    def _counted(self, iterable: Any) -> Any:
        """What a loop goes through."""
        if isinstance(iterable, Sized):
            self._spend(len(iterable))
            return iterable
        return self._counted_items(iterable)

    def _counted_items(self, iterable: Iterable[Any]) -> Iterator[Any]:
        for item in iterable:
            self._spend(1)
            yield item

    def _joined(self, parts: list[Any]) -> str:
        """`a ~ b`."""
        self._spend(1)
        self._spend_characters(_deep_size(parts))
        return "".join(map(str, parts))

    @pass_context  # so that it is not called when the template is compiled
    def _shown(self, context: Context, value: Any) -> Any:
        """A value on its way into the text."""
        self._spend(1)
        self._spend_characters(_deep_size(value))
        return value


class _Namespace(Namespace):
    """Refuses names that would hide what the sandbox relies on."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # As the base class, so that a template may have a name `self`.
        self, *others = args
        values = dict(*others, **kwargs)
        for name in values:
            _require_public(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _require_public(name)
        super().__setitem__(name, value)


def _require_public(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"it stores a name that begins with an underscore, {name!r}")


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    """The function `dict` of templates, without the class's own attributes."""
    return dict(*args, **kwargs)


def _weight(value: object) -> int:
    """Steps for handling a value once."""
    if isinstance(value, str):
        return len(value) // _CHARACTERS_PER_STEP
    return len(value) // _ITEMS_PER_STEP if isinstance(value, list | tuple | dict | range) else 0


def _deep_size(value: object) -> int:
    """Characters of a value and all in it, some for each item, or more than may be."""
    size, stack = 0, [value]
    while stack and size <= MAX_LENGTH:
        item = stack.pop()
        size += len(item) if isinstance(item, str) else _ITEMS_PER_STEP
        if isinstance(item, dict):
            stack += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple | set | frozenset | range):
            stack += item
    return size


class _CountLoops(NodeTransformer):
    """Lets every loop and every joined text pass by the budget."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        node.iter = nodes.Filter(node.iter, "_counted", [], [], None, None, lineno=node.lineno)
        return self.generic_visit(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        parts = nodes.List(node.nodes, lineno=node.lineno)
        return self.generic_visit(nodes.Filter(parts, "_joined", [], [], None, None, lineno=node.lineno))
