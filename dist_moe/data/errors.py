"""The error that every part of the data pipeline raises: the value, the rule it breaks, and the remedy."""

from dist_moe.errors import UserError


class DataError(UserError):
    """Data that cannot be fetched, read or split.

    value is what was met (a source name, `file:line`, a setting), rule what it breaks, remedy what to do
    about it.
    """

    def __init__(self, value: str, rule: str, remedy: str) -> None:
        super().__init__(f"{value} {rule}; {remedy}")
        self.value = value
        self.rule = rule
        self.remedy = remedy

    def __reduce__(self) -> tuple[type["DataError"], tuple[str, str, str]]:
        """Let the error cross a process border: the default would rebuild it from its one-line message
        alone."""
        return type(self), (self.value, self.rule, self.remedy)
