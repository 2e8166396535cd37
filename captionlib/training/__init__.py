"""The training jobs, without Beam: data in, checkpoints out."""
