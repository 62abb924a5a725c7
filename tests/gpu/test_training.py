"""Mini models trained by the compiled backend follow the reference run, as closely as bf16 itself follows float32."""

import pytest
import torch
import torch.nn.functional as F

from slope_pl import SLoPeConfig, sparse_layers, sparsify, wake_adapters
from tests.gpu.compiled_cases import require_extension

pytestmark = pytest.mark.gpu
STEPS, REFRESH, WAKE, VOCABULARY, LENGTH = 60, 20, 50, 128, 24


@pytest.fixture(autouse=True)
def _extension():
    require_extension()


def bert():
    transformers = pytest.importorskip("transformers", reason="mini models come from transformers")
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )
    return transformers.BertForMaskedLM(config).eval()  # no dropout: runs are compared step by step


def gpt():
    transformers = pytest.importorskip("transformers", reason="mini models come from transformers")
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=LENGTH)
    return transformers.GPT2LMHeadModel(config).eval()


def losses_of(build, backend, products, precision):
    """Losses of a short run: parameters in float32 (mixed) or in the products' dtype (true)."""
    torch.manual_seed(1)
    model = build().cuda()
    if precision == "true":
        model = model.to(products)
    sparsify(model, SLoPeConfig(adapter_rank=4, backend=backend))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    generator = torch.Generator("cuda").manual_seed(2)
    result = []
    for step in range(STEPS):
        if step and step % REFRESH == 0:
            for layer in sparse_layers(model).values():
                layer.refresh_backward_mask()
        if step == WAKE:
            assert wake_adapters(model) > 0
        tokens = torch.randint(VOCABULARY, (8, LENGTH), device="cuda", generator=generator)
        tokens[:, 1::2] = (tokens[:, ::2] * 3 + 1) % VOCABULARY  # something to learn
        with torch.autocast("cuda", products, enabled=precision == "mixed" and products is not torch.float32):
            logits = model(input_ids=tokens).logits
        loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        result.append(loss.item())
    return torch.tensor(result)


@pytest.mark.parametrize("precision", ["mixed", "true"])
@pytest.mark.parametrize("build", [bert, gpt])
def test_a_run_follows_the_reference_run(build, precision):
    exact = losses_of(build, "reference", torch.float32, "mixed")
    reference = losses_of(build, "reference", torch.bfloat16, precision)
    compiled = losses_of(build, "cusparselt", torch.bfloat16, precision)
    assert exact[-5:].mean() < exact[:5].mean() - 0.2  # it learns at all
    drift, ours = (reference - exact).abs(), (compiled - exact).abs()
    assert ours[0] <= 2 * drift[0] + 2**-9 * exact[0]
    assert ours.max() <= 2 * drift.max(), f"{ours.max()} against {drift.max()}"
    assert ours.mean() <= 2 * drift.mean(), f"{ours.mean()} against {drift.mean()}"
