"""GPT-2 pretraining, dense and sparse."""
