"""Contract test of Weights & Biases for flash.compat.wandb."""

import wandb

from tests.compat.contract import contract
from tests.tracking.offline import read_runs


def test_an_offline_run_records_the_artifacts_that_it_has_read(tmp_path):
    with contract(
        "wandb's Run._log_artifact with use_after_commit",
        "flash.compat.wandb.record_use",
        "record offline what a run has read",
    ):
        from flash.compat.wandb import record_use

        path = tmp_path / "file.txt"
        path.write_text("content")
        settings = wandb.Settings(silent=True, reinit="create_new")
        with wandb.init(dir=tmp_path, mode="offline", settings=settings) as run:
            artifact = wandb.Artifact("file", type="text")
            artifact.add_reference(f"file://{path}", name=path.name)
            record_use(run, artifact)
        [found] = read_runs(tmp_path)
        [used] = found.used
        assert (used.name, used.type, used.digest) == ("file", "text", artifact.digest)
