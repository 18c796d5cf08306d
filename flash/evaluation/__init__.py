"""Finished models: quality of the artefact itself, and the export that proves it."""

from flash.evaluation.artefact import ExportResult
from flash.evaluation.job import ExportSettings
from flash.evaluation.perplexity import ArtefactQuality, artefact_quality
from flash.evaluation.run import export

__all__ = ["ArtefactQuality", "ExportResult", "ExportSettings", "artefact_quality", "export"]
