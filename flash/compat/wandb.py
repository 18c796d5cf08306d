"""Weights & Biases: artifacts that a run reads.

Names that wandb 0.31 does not document, and the reasons to use them:

- `Run._log_artifact` with `use_after_commit`: the documented `Run.use_artifact` refuses to work
  offline, and online it waits for the server. This records the artifact; the server finds the
  version with the same content, or makes one, and notes that the run has used it.
"""

import wandb


def record_use(run: wandb.Run, artifact: wandb.Artifact) -> None:
    """Record that a run, online or offline, has read an artifact that was built from its files."""
    run._log_artifact(artifact, is_user_created=True, use_after_commit=True)
