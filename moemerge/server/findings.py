"""What is wrong with a body, in plain words and with the field at fault: from pydantic's findings."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moemerge.server.errors import ApiError, invalid
from moemerge.text.limits import show_value

_LONGEST_PARAM = 100
_CODES = {
    "extra_forbidden": "unknown_field",
    "missing": "missing_field",
    "unsupported_field": "unsupported_field",
}
_WHOLE, _TEXT, _OBJECT = "expected a whole number", "expected a string", "expected an object"
_EXPECTED: Mapping[str, str] = {
    "int_type": _WHOLE,
    "int_from_float": _WHOLE,
    "int_parsing": _WHOLE,
    "float_type": "expected a number",
    "finite_number": "expected a finite number",
    "bool_type": "expected true or false",
    "string_type": _TEXT,
    "list_type": "expected a list",
    "dict_type": _OBJECT,
    "model_type": _OBJECT,
    "model_attributes_type": _OBJECT,
    "greater_than_equal": "expected at least {ge}",
    "greater_than": "expected more than {gt}",
    "less_than_equal": "expected at most {le}",
    "less_than": "expected less than {lt}",
    "literal_error": "expected {expected}",
    # The only pattern there is.
    "string_pattern_mismatch": "expected a token id such as 42",
}
_PROBLEMS: Mapping[str, str] = {
    "missing": "is missing",
    "extra_forbidden": "is not a field that this server knows",
    "too_short": "has too few entries, expected at least {min_length}",
    "too_long": "has too many entries, expected at most {max_length}",
    "string_too_short": "is too short, expected {min_length} or more characters",
    "string_too_long": "is too long, expected at most {max_length} characters",
}


def describe(findings: Sequence[Any]) -> ApiError:
    """The answer to a body that does not fit its model: the first finding, and how many there are."""
    first = findings[0]
    kind, context = first["type"], first.get("ctx", {})
    param = context.get("field") or _place(first["loc"], keep_last=kind == "extra_forbidden")
    param = param[:_LONGEST_PARAM]
    # Our own checks of several fields name them in their messages.
    message = str(first["msg"]) if "field" in context else f"{param or 'the body'} {_problem(first)}"
    more = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
    return invalid(message + more, param or None, _CODES.get(kind, "invalid_value"))


def _problem(finding: Any) -> str:
    kind = finding["type"]
    bounds = {name: _plain(value) for name, value in finding.get("ctx", {}).items()}
    if kind in _PROBLEMS:
        return _PROBLEMS[kind].format(**bounds)
    expected = _EXPECTED[kind].format(**bounds) if kind in _EXPECTED else str(finding["msg"])
    return f"is {show_value(finding['input'])}, {expected}"


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _place(steps: Iterable[int | str], *, keep_last: bool) -> str:
    """The place in a body in a client's terms: without the names that pydantic gives to alternatives."""
    *outer, last = steps
    if not (keep_last or _is_named(last)):
        outer, last = outer, ""
    named = [str(step) for step in outer if _is_named(step)] + ([str(last)] if last != "" else [])
    return ".".join(named[1:] if named[:1] in (["body"], ["query"], ["path"]) else named)


def _is_named(step: int | str) -> bool:
    return isinstance(step, int) or (step.isidentifier() and step not in ("str", "int", "float", "bool"))
