"""What a team looks at: the result table, figures, the HTML page, and the same in W&B."""

from flash.report.data import Model, ReportData, read
from flash.report.figures import all_figures, study_figures
from flash.report.page import render, write_page
from flash.report.table import COLUMNS, as_text, rows

__all__ = [
    "COLUMNS",
    "Model",
    "ReportData",
    "all_figures",
    "as_text",
    "read",
    "render",
    "rows",
    "study_figures",
    "write_page",
]
