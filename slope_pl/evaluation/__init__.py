"""Scores of trained models. :mod:`slope_pl.evaluation.harness` needs lm_eval, which the extra ``eval`` installs."""
