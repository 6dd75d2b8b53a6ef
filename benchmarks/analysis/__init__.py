"""From rows to estimates with intervals, tables and verdicts."""
