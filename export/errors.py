"""The one error of an export that a user can act on."""


class ExportError(Exception):
    """What was wrong (file, tensor or value, expected and found) and what to do: one line fit for a user."""
