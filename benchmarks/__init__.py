"""The benchmark suite: one file per figure, and what they share.

Data flows one way: profile → cells → rows → table → figure.
"""
