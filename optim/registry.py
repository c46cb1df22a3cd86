"""The rules by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import final

from .rule import Rule


@final
class RuleRegistry:
    """The rules by name, as a job's description names them."""

    def __init__(self, *rules: type[Rule]) -> None:
        self._rules = {rule.name: rule for rule in rules}

    def names(self) -> list[str]:
        """All rule names, sorted."""
        return sorted(self._rules)

    def to_fields(self, rule: Rule) -> dict[str, object]:
        """A rule's fields as plain values."""
        return {field.name: getattr(rule, field.name) for field in dataclasses.fields(rule)}

    def build(self, name: str, fields: Mapping[str, object]) -> Rule:
        """Rebuild a rule from its name and fields.

        Raises:
            ValueError: If the rule or one of the fields is unknown here, or a value is out of range.
        """
        if name not in self._rules:
            raise ValueError(f"unknown rule {name!r}; this version knows {', '.join(self.names())}")
        known = {field.name for field in dataclasses.fields(self._rules[name])}
        if unknown := sorted(set(fields) - known):
            raise ValueError(f"rule {name} has no field {unknown[0]!r}; it has {', '.join(sorted(known))}")
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
        return self._rules[name](**values)
