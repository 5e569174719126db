"""CausalLM against transformers: logits, gradients, cached decoding, packed documents, and files in both directions."""

import json

import pytest
import torch

from arfast.models import CausalLM
from arfast.models.families import ARCHITECTURES
from arfast.nn import StaticKVCache


@pytest.fixture
def model(case) -> CausalLM:
    return CausalLM.from_pretrained(case.path)


def test_parameters(case, model):
    expected = dict(case.reference.named_parameters())
    actual = dict(model.named_parameters())
    assert actual.keys() == expected.keys()
    for name, parameter in actual.items():
        assert torch.equal(parameter, expected[name]), name
    assert model.config.num_parameters() == case.reference.num_parameters()


def test_stacked_experts_on_disk(case, model, tmp_path):
    """The other layout that transformers writes."""
    case.reference.save_pretrained(tmp_path, save_original_format=False)
    for (name, a), b in zip(model.named_parameters(), CausalLM.from_pretrained(tmp_path).parameters()):
        assert torch.equal(a, b), name


@torch.no_grad()
def test_logits(case, model, input_ids):
    expected = case.reference(input_ids).logits
    assert expected.std() > 0.3  # else the bound would be easy
    assert (model(input_ids).logits - expected).abs().max() < 1e-4


def test_gradients(case, model, input_ids):
    labels = input_ids.clone()
    labels[0, :4] = -100
    case.reference.zero_grad()
    expected = case.reference(input_ids, labels=labels).loss
    expected.backward()
    out = model(input_ids, labels=labels)
    out.loss.backward()
    assert out.num_tokens == 2 * 22 - 3
    torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=1e-6)
    gradients = {name: parameter.grad for name, parameter in case.reference.named_parameters()}
    for name, parameter in model.named_parameters():
        worst = (parameter.grad - gradients[name]).abs().max() / gradients[name].abs().max()
        assert worst < 1e-3, f"{name}: relative error {worst:.2e}"


@torch.no_grad()
def test_position_ids(case, model, input_ids):
    positions = torch.arange(23).repeat(2, 1)
    positions[1] += 17
    positions[1, 10:] += 30
    expected = case.reference(input_ids, position_ids=positions).logits
    assert (model(input_ids, position_ids=positions).logits - expected).abs().max() < 1e-4


@torch.no_grad()
def test_cached_decoding_equals_whole(model, input_ids):
    whole = model(input_ids).logits
    cache = StaticKVCache(model.config, batch_size=2, max_length=32)
    cache.k.fill_(float("nan"))  # slots that were not written must not be read
    cache.v.fill_(float("nan"))
    pieces = [model(piece, cache=cache).logits for piece in input_ids.split([11, 1, 1, 4, 6], dim=1)]
    assert cache.lengths.tolist() == [23, 23]
    assert (torch.cat(pieces, dim=1) - whole).abs().max() < 1e-4


@torch.no_grad()
def test_ragged_prefill_then_decode(case, model, input_ids):
    prompts = [input_ids[0, :5], input_ids[1, :14], input_ids[0, 6:7]]
    cu_seqlens = torch.tensor([0, 5, 19, 20], dtype=torch.int32)
    cache = StaticKVCache(model.config, batch_size=3, max_length=20)
    last = model(torch.cat(prompts)[None], cu_seqlens=cu_seqlens, cache=cache, logits_to_keep=cu_seqlens[1:] - 1).logits
    assert last.shape == (1, 3, 101)
    step = model(torch.tensor([[7], [8], [9]]), cache=cache).logits
    assert cache.lengths.tolist() == [6, 15, 2]
    for row, (prompt, token) in enumerate(zip(prompts, (7, 8, 9))):
        expected = case.reference(torch.cat((prompt, torch.tensor([token])))[None]).logits[0]
        assert (last[0, row] - expected[-2]).abs().max() < 1e-4
        assert (step[row, 0] - expected[-1]).abs().max() < 1e-4


def test_packed_documents_equal_separate_ones(model, input_ids):
    cu_seqlens = torch.tensor([0, 9, 10, 10, 29, 46], dtype=torch.int32)
    flat = input_ids.view(1, -1)
    documents = [flat[:, start:stop] for start, stop in zip(cu_seqlens, cu_seqlens[1:]) if stop > start]
    with torch.no_grad():
        separate = torch.cat([model(document).logits for document in documents], dim=1)
        assert (model(flat, cu_seqlens=cu_seqlens).logits - separate).abs().max() < 1e-4
    packed = model(flat, labels=flat, cu_seqlens=cu_seqlens)
    assert packed.num_tokens == 46 - 4  # the first token of each document has no prediction
    packed.loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    losses = [model(document, labels=document, num_items=42).loss for document in documents]
    sum(losses).backward()
    torch.testing.assert_close(packed.loss, sum(losses), rtol=1e-5, atol=1e-6)
    for (name, parameter), gradient in zip(model.named_parameters(), gradients):
        assert (parameter.grad - gradient).abs().max() <= 1e-3 * gradient.abs().max(), name


@torch.no_grad()
@pytest.mark.parametrize("max_shard_bytes", [10**9, 40_000])
def test_transformers_reads_what_we_write(case, model, input_ids, tmp_path, max_shard_bytes):
    from transformers import AutoModelForCausalLM

    model.save_pretrained(tmp_path, max_shard_bytes=max_shard_bytes)
    num_files = len(list(tmp_path.glob("*.safetensors")))
    assert num_files == 1 if max_shard_bytes == 10**9 else num_files > 3
    family = json.loads((case.path / "config.json").read_text())["model_type"]
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [ARCHITECTURES[family]]
    loaded, report = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    assert (loaded.eval()(input_ids).logits - model(input_ids).logits).abs().max() < 1e-4
    again = CausalLM.from_pretrained(tmp_path)
    assert again.config == model.config
    for (name, parameter), other in zip(again.named_parameters(), model.parameters()):
        assert torch.equal(parameter, other), name
