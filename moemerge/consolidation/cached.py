"""A property that is computed once for each object."""

from collections.abc import Callable
from typing import Any, Generic, Self, TypeVar, overload

Value = TypeVar("Value")


class CachedProperty(Generic[Value]):
    """As `functools.cached_property`, which up to Python 3.11 has one lock for the property of all objects.

    With that, threads that work on objects of their own would wait for each other. Here one object's property
    may be computed twice, by threads that ask at the same time.

    Args:
        compute: From the object.
    """

    def __init__(self, compute: Callable[[Any], Value]) -> None:
        self._compute = compute
        self.__doc__ = compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...

    @overload
    def __get__(self, instance: object, owner: type) -> Value: ...

    def __get__(self, instance: object | None, owner: type) -> Self | Value:
        if instance is None:
            return self
        # What is in an object's own dictionary is found before this is asked again.
        value = vars(instance)[self._name] = self._compute(instance)
        return value
