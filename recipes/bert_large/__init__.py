"""BERT-Large on SQuAD, sparse and dense."""
