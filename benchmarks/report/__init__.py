"""The report: one self-contained page of verdicts, figures and tables."""
