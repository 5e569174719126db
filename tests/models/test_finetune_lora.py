"""Adapters against peft on transformers' models: logits, gradients, merging, and files in both directions."""

import json

import pytest
import torch
from accuracy import assert_accurate
from safetensors.torch import load_file, save_file

from arfast.adapter import _peft_name, _to_peft, load_adapter, load_base, save_adapter
from arfast.models import CausalLM
from arfast.nn.lora import LINEAR_TARGETS, adapter_parameters, apply_lora, count_parameters, merge_lora

peft = pytest.importorskip("peft")
ATTENTION = ("q_proj", "v_proj")


def randomize(parameters):
    generator = torch.Generator().manual_seed(3)
    for parameter in parameters:
        parameter.data.normal_(0, 0.2, generator=generator)


def reload_reference(case):
    from transformers import AutoModelForCausalLM

    options = dict(attn_implementation="eager", experts_implementation="eager")  # which take float64
    return AutoModelForCausalLM.from_pretrained(case.path, dtype=torch.float32, **options).eval()


def adapted(case, targets=LINEAR_TARGETS, **options):
    model = apply_lora(load_base(case.path), rank=3, alpha=7.0, targets=targets, **options)
    randomize(parameter for _, parameter in adapter_parameters(model))
    return model


def logits_in_double(peft_model, input_ids):
    with torch.no_grad():
        return peft_model.double()(input_ids).logits


def assert_same_logits(model, peft_model, input_ids):
    """Ours in float32 within twice peft's own error."""
    with torch.no_grad():
        actual, baseline = model(input_ids).logits, peft_model(input_ids).logits
    assert_accurate(actual, logits_in_double(peft_model, input_ids), baseline, name="logits", ulps=8)


TARGETS = {"all": LINEAR_TARGETS, "attention": ATTENTION, "head": (*ATTENTION, "lm_head")}


@pytest.fixture
def targets(request):
    return TARGETS[getattr(request, "param", "all")]


def test_peft_loads_ours(case, targets, input_ids, tmp_path):
    model = adapted(case, targets)
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "base.json",
    ]
    theirs = peft.PeftModel.from_pretrained(reload_reference(case), tmp_path).eval()
    with torch.no_grad():
        changed = (theirs(input_ids).logits - case.reference(input_ids).logits).abs().max()
    assert changed > 0.1  # the adapters do something
    assert_same_logits(model, theirs, input_ids)


def peft_adapter(case, targets, path, **options):
    """An adapter that peft made and wrote."""
    experts = [name for name, _ in case.reference.named_parameters() if "experts.gate_up_proj" in name]
    wanted = [target for target in targets if target not in ("gate_proj", "up_proj", "down_proj") or not experts]
    if experts and "down_proj" in targets:
        options["target_parameters"] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=wanted, task_type="CAUSAL_LM", **options)
    theirs = peft.get_peft_model(reload_reference(case), config).eval()
    randomize(parameter for name, parameter in theirs.named_parameters() if "lora_" in name)
    theirs.save_pretrained(path)
    return theirs


def test_we_load_peft_s(case, targets, input_ids, tmp_path):
    theirs = peft_adapter(case, targets, tmp_path)
    model = load_adapter(load_base(case.path), tmp_path)
    assert_same_logits(model, theirs, input_ids)
    # and what we write of it has the same tensors again
    save_adapter(model, tmp_path / "again")
    written, again = (load_file(path / "adapter_model.safetensors") for path in (tmp_path, tmp_path / "again"))
    for name, tensor in again.items():
        assert torch.equal(tensor, written[name]), name
    assert {name for name in written if "lora_" in name} == again.keys()


@pytest.mark.parametrize("case", ["llama", "mixtral"], indirect=True)
@pytest.mark.parametrize("options", [{"use_rslora": True}, {"layers_to_transform": [1]}], ids=["rslora", "one-layer"])
def test_we_load_peft_s_options(case, options, input_ids, tmp_path):
    theirs = peft_adapter(case, ATTENTION, tmp_path / "theirs", **options)
    model = load_adapter(load_base(case.path), tmp_path / "theirs")
    assert_same_logits(model, theirs, input_ids)
    save_adapter(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(reload_reference(case), tmp_path / "ours").eval()
    assert_same_logits(model, again, input_ids)


def test_merge_equals_peft(case, targets, input_ids, tmp_path):
    model = adapted(case, targets)
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(reload_reference(case), tmp_path).merge_and_unload()
    exact = peft.PeftModel.from_pretrained(reload_reference(case).double(), tmp_path).double().merge_and_unload()
    merge_lora(model)
    assert model.lora is None and all(parameter.requires_grad for parameter in model.parameters())
    expected, exact = dict(theirs.named_parameters()), dict(exact.named_parameters())
    assert dict(model.named_parameters()).keys() == expected.keys()
    for name, parameter in model.named_parameters():
        assert_accurate(parameter, exact[name], expected[name], name=name)
    model.save_pretrained(tmp_path / "merged")  # a whole model again
    again = CausalLM.from_pretrained(tmp_path / "merged")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters()))


def test_gradients_equal_peft(case, targets, input_ids, tmp_path):
    model = adapted(case, targets)
    model.save_pretrained(tmp_path)

    def gradients(dtype):
        base = reload_reference(case).to(dtype)
        theirs = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True, autocast_adapter_dtype=False)
        theirs = theirs.to(dtype).eval()
        theirs(input_ids, labels=input_ids).loss.backward()
        named = theirs.named_parameters()
        return {name.replace(".default", ""): parameter.grad for name, parameter in named if parameter.requires_grad}

    baseline, exact = gradients(torch.float32), gradients(torch.float64)
    model(input_ids, labels=input_ids).loss.backward()
    trained = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert trained == [name for name, _ in adapter_parameters(model)]
    gradients = {_peft_name(model, name): _to_peft(name, p.grad) for name, p in adapter_parameters(model)}
    assert gradients.keys() == exact.keys()
    for name, gradient in gradients.items():
        assert_accurate(gradient, exact[name], baseline[name], name=name, ulps=256)  # through all layers


@pytest.mark.parametrize("case", ["llama", "mixtral", "qwen3-moe"], indirect=True)
@pytest.mark.parametrize("targets", ["attention", "head"], indirect=True)
@pytest.mark.parametrize(
    "check", [test_peft_loads_ours, test_we_load_peft_s, test_merge_equals_peft, test_gradients_equal_peft]
)
def test_other_targets(check, case, targets, input_ids, tmp_path):
    check(case, targets, input_ids, tmp_path)


def test_starts_as_the_base(case, input_ids):
    model = load_base(case.path)
    with torch.no_grad():
        before = model(input_ids).logits
        after = apply_lora(model, rank=2)(input_ids).logits
    assert torch.equal(before, after) or (before - after).abs().max() < 1e-5


def test_counts_what_peft_counts(case, tmp_path):
    theirs = peft_adapter(case, ATTENTION, tmp_path)
    trainable, total = theirs.get_nb_trainable_parameters()
    assert count_parameters(apply_lora(load_base(case.path), rank=3, targets=ATTENTION)) == (trainable, total)


def refused(case, path, message):
    model = load_base(case.path)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load_adapter(model, path)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert model.lora is None


@pytest.mark.parametrize("case", ["llama"], indirect=True)
class TestRefused:
    @pytest.fixture
    def adapter(self, case, tmp_path):
        adapted(case, ATTENTION).save_pretrained(tmp_path)
        return tmp_path

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"peft_type": "LOHA"}, "peft_type must be 'LORA', got 'LOHA'"),
            ({"use_dora": True}, "use_dora must be absent, got True"),
            ({"bias": "all"}, "bias must be absent, got 'all'"),
            ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern must be absent"),
            ({"modules_to_save": ["embed_tokens"]}, "modules_to_save must be absent"),
            ({"auto_map": "evil.Config"}, "auto_map must be absent"),
            ({"init_lora_weights": "pissa"}, "init_lora_weights must keep the base, got 'pissa'"),
            ({"init_lora_weights": []}, "init_lora_weights must keep the base, got []"),
            ({"r": "8"}, "r must be an integer, got '8'"),
            ({"r": 4}, "must be floating-point [4, 64], got torch.float32 [3, 64]"),
            ({"lora_alpha": -1}, "adapter_config.json: alpha must be a positive number of float32, got -1"),
            ({"lora_dropout": 1.0}, "dropout must be in [0, 1), got 1.0"),
            ({"use_rslora": 1}, "use_rslora must be true or false, got 1"),
        ],
    )
    def test_config(self, case, adapter, changes, message):
        file = adapter / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
        refused(case, adapter, message)

    def test_tensors(self, case, adapter):
        file = adapter / "adapter_model.safetensors"
        good = load_file(file)
        name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

        def check(tensors, message):
            save_file(tensors, file)
            refused(case, adapter, message)

        check({}, "must hold adapters, got none")
        check({key: value for key, value in good.items() if key != name}, "must hold A and B of every layer")
        check({**good, "model.norm.weight": torch.ones(64)}, "must hold adapters of layers of the model")
        check(
            {**good, name.replace("q_proj", "z_proj"): good[name].clone()}, "must hold adapters of layers of the model"
        )
        check({**good, name: good[name].int()}, "must be floating-point [3, 64], got torch.int32")
        file.write_bytes(file.read_bytes()[:-8])
        refused(case, adapter, "must be a complete safetensors file")

    def test_files(self, case, adapter, tmp_path_factory):
        elsewhere = tmp_path_factory.mktemp("elsewhere")
        refused(case, elsewhere, "path must hold adapter_config.json")
        (adapter / "adapter_model.safetensors").rename(elsewhere / "adapter_model.safetensors")
        (adapter / "adapter_model.safetensors").symlink_to(elsewhere / "adapter_model.safetensors")
        refused(case, adapter, "adapter_model.safetensors must lie in its directory")

    def test_another_base(self, case, adapter, tmp_path_factory):
        other = load_base(case.path)
        other.head_weight.data[0, 0] += 1
        path = tmp_path_factory.mktemp("other")
        other.save_pretrained(path)
        model = load_base(path)
        with pytest.raises(ValueError, match="load_adapter: model must be the one of base.json, files:"):
            load_adapter(model, adapter)
        assert load_adapter(model, adapter, check_base=False).lora.rank == 3
