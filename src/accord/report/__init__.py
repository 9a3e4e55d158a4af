"""The report: one self-contained HTML page per stage and one for a whole run, from the run folders alone."""

from accord.report.overview import overview_report
from accord.report.stage import stage_report

__all__ = ["overview_report", "stage_report"]
