"""The report of a comparison: does distillation help, by how much, and how surely."""

from dhrd_plugin.comparison.page import write_report

__all__ = ['write_report']
