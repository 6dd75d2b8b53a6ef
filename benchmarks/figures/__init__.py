"""Figures and tables: one file each, from the cells it needs to its drawing."""
