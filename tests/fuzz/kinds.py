"""All kinds of attempts, by name."""

import importlib

from tests.fuzz import boards, caches, checkpoints, results, settings, texts

KINDS = {
    **settings.KINDS,
    **checkpoints.KINDS,
    **texts.KINDS,
    **caches.KINDS,
    **results.KINDS,
    **boards.KINDS,
}


def load_all() -> None:
    """Import what commands import, so that forked processes need not."""
    for name in (
        *("torch", "lightning.pytorch", "transformers", "tokenizers", "datasets"),
        *("flash.cli", "flash.config", "flash.jobs", "flash.training.run", "flash.search.run"),
        *("flash.export.run", "flash.evaluation.run", "flash.data.prepare"),
        *("flash.data.chat", "flash.data.sources", "flash.data.logical_shards"),
        *("flash.report.command", "pyarrow.parquet"),
        *("flash.interop.gguf_folder", "flash.latency.command", "optuna", "executorch.exir"),
    ):
        importlib.import_module(name)
