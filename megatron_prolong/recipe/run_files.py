"""Names in a run directory, beside those of its stages: who writes them, reads them, or keeps stages off them."""

RESOLVED_RECIPE = "recipe.yaml"
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
INITIAL = "initial"
"""The weights before the first stage, where they had to be converted or made."""
EVALUATION = "evaluation"
LATEST = "latest"
"""In the directory of a stage: the name of its newest checkpoint."""

RESERVED_STAGE_NAMES = (INITIAL, "export", TENSORBOARD, EVALUATION)
