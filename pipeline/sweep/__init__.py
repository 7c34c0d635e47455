"""Searches over fields of a recipe by Optuna, judged on validation days alone: `trefoil sweep`."""
