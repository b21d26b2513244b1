"""Names of a run's files."""

RESULT, ITEMS, ERROR = "result.json", "items.json", "error.txt"
