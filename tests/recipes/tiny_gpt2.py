"""Arguments that make a GPT-2 run one of seconds."""

NET = [
    *("--model.gpt2.n_embd", "32", "--model.gpt2.n_layer", "2"),
    *("--model.gpt2.n_positions", "32", "--data.context", "32"),
]
