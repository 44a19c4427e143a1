"""Text encoders of the BERT kind, from transformers: built, loaded, read layer by layer, and given a classifier.

    loaded = TEXT_ENCODER.build(vocab_size=4000, hidden=64, layers=2, heads=4, intermediate=256, max_length=32)
    reading = read(handle, tokens, mask)             # hidden states, attention scores, pooled first token
    module = with_classifier(encoder, head, names)   # what AutoModelForSequenceClassification loads

Any architecture serves whose layers are `encoder.layer.N.attention.self.{query, key}` and whose classifier is one
linear layer on the pooled first token: bert and ernie.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ..errors import UserError
from .build import parse
from .family import Loaded
from .folder import refuse_pickles
from .quiet import quiet

if TYPE_CHECKING:
    from ..data.tokenizer import Words
    from ..roles import Handle

MODEL_TYPES = ("bert", "ernie")
CARRIED = "fewstep_tokenizer"


class TextEncoderConfig(BaseModel):
    """Sizes of a BERT encoder. With `classes` it has a classifier: a linear layer on the pooled first token."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    vocab_size: int = Field(gt=0)
    hidden: int = Field(default=128, gt=0, description="width; a multiple of heads")
    layers: int = Field(default=4, gt=0)
    heads: int = Field(default=4, gt=0)
    intermediate: int = Field(default=512, gt=0, description="width of the feed-forward layer")
    max_length: int = Field(default=128, gt=0, description="longest row of tokens")
    classes: int | None = Field(default=None, gt=0)
    dropout: float = Field(default=0.1, ge=0, lt=1)


class TextEncoderFamily:
    """Encoders in transformers' own folder form (config.json, model.safetensors)."""

    name = "text_encoder"
    networks = tuple(
        f"{kind}{head}"
        for kind in ("Bert", "Ernie")
        for head in ("Model", "ForSequenceClassification", "ForMaskedLM", "ForPreTraining")
    )  # classes in a stock folder's config.json that `load` understands

    def build(self, **config: Any) -> Loaded:
        """A BertModel, or a BertForSequenceClassification when `classes` is given, with random weights."""
        from transformers import BertConfig, BertForSequenceClassification, BertModel

        c = parse(TextEncoderConfig, config, "text_encoder build")
        if c.hidden % c.heads:
            raise UserError(f"text_encoder build: hidden={c.hidden} is no multiple of heads={c.heads}")
        sizes = BertConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.hidden,
            num_hidden_layers=c.layers,
            num_attention_heads=c.heads,
            intermediate_size=c.intermediate,
            max_position_embeddings=c.max_length,
            hidden_dropout_prob=c.dropout,
            attention_probs_dropout_prob=c.dropout,
        )
        sizes.num_labels = c.classes or 2
        return Loaded(BertModel(sizes) if c.classes is None else BertForSequenceClassification(sizes), self.name)

    def load(self, folder: Path) -> Loaded:
        """The encoder in `folder`, with its classifier when it has one; a masked-word head is left out."""
        from safetensors import SafetensorError
        from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

        refuse_pickles(folder)
        config = _config(folder)
        if config.get("model_type") not in MODEL_TYPES:
            kind = config.get("model_type", "nothing known")
            raise UserError(f"'{folder}' holds {kind}: text_encoder reads {', '.join(MODEL_TYPES)}")
        classifies = str((config.get("architectures") or [""])[0]).endswith("ForSequenceClassification")
        auto = AutoModelForSequenceClassification if classifies else AutoModel
        if torch.get_default_device().type == "meta":  # the memory plan asks for sizes and not for weights
            return Loaded(auto.from_config(AutoConfig.from_pretrained(folder)), self.name)
        try:
            with quiet():
                module = auto.from_pretrained(
                    folder, use_safetensors=True, local_files_only=True, dtype=torch.float32, trust_remote_code=False
                )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(f"cannot load a text encoder from '{folder}': {str(error).splitlines()[0]}") from error
        return Loaded(module, self.name)

    def save(self, module: nn.Module, folder: Path) -> None:
        """Writes config.json, model.safetensors and the tokenizer it carries, as transformers' Auto classes read them."""
        with quiet():
            module.save_pretrained(folder)  # type: ignore[operator]
        if hasattr(module, CARRIED):
            getattr(module, CARRIED).save(folder, _sizes(module).max_position_embeddings)

    def lora_targets(self, width: str) -> Sequence[str]:
        """default: query and value; wide: all linear layers inside the blocks."""
        if width == "all":
            return ["*"]
        return ["query", "value"] if width == "default" else ["query", "key", "value", "dense"]


TEXT_ENCODER = TextEncoderFamily()


@dataclass(frozen=True)
class Reading:
    """What an encoder says about tokens [rows, length].

    hidden: one [rows, length, width] a layer, after the embeddings (0) and after each block (1..depth).
    scores: attention scores q k^T / sqrt(d_h), [rows, heads, length, length] in float32, by layer (1..depth), before
        the padding mask and the softmax.
    pooled: tanh(W h_first + b), [rows, width].
    """

    hidden: Sequence[Tensor]
    scores: dict[int, Tensor]
    pooled: Tensor


def encoder_of(module: nn.Module) -> nn.Module:
    """The encoder inside a network with a classifier; an encoder itself."""
    return module.base_model  # type: ignore[return-value]


def depth(module: nn.Module) -> int:
    """Number of blocks."""
    return _sizes(module).num_hidden_layers


def width(module: nn.Module) -> int:
    """Features of a hidden state."""
    return _sizes(module).hidden_size


def heads(module: nn.Module) -> int:
    """Number of attention heads in a block."""
    return _sizes(module).num_attention_heads


def word_embeddings(module: nn.Module) -> Tensor:
    """[vocabulary, width]"""
    return module.get_input_embeddings().weight  # type: ignore[operator]


def read(handle: Handle, tokens: Tensor, mask: Tensor, layers: Sequence[int] = ()) -> Reading:
    """Runs the encoder of a role on tokens and mask [rows, length], keeping the scores of blocks `layers` (1..depth).

    Scores are made again from the query and key projections, so that any attention kernel can run inside, and the
    adapter and the precision are the role's.
    """
    module, encoder = handle.module, encoder_of(handle.module)
    run = handle.part("" if encoder is module else module.base_model_prefix)  # type: ignore[arg-type]
    with _projections(encoder, layers) as caught:
        out = run(input_ids=tokens, attention_mask=mask, output_hidden_states=True)
    split = heads(module)
    scores = {layer: _scores(caught[layer, "query"], caught[layer, "key"], split) for layer in layers}
    return Reading(out.hidden_states, scores, out.pooler_output)


def logits(handle: Handle, reading: Reading) -> Tensor:
    """[rows, classes] of a role that has a classifier, from what `read` gave (no second pass, no dropout)."""
    return handle.part("classifier")(reading.pooled)


def classes_of(handle: Handle) -> int:
    """Number of classes of a role's classifier. UserError when it has none."""
    classifier = getattr(handle.module, "classifier", None)
    if not isinstance(classifier, nn.Linear):
        raise UserError(f"role '{handle.name}' has no classifier: give it a model trained by text_classify")
    return classifier.out_features


def check_fits(handle: Handle, vocab_size: int, length: int) -> None:
    """UserError when rows of `length` tokens out of `vocab_size` are too much for a role's encoder."""
    config = _sizes(handle.module)
    if vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer has {vocab_size} entries and '{handle.name}' embeds {config.vocab_size}: "
            f"build it with vocab_size={vocab_size}, or use the tokenizer it was trained with"
        )
    if length > config.max_position_embeddings:
        raise UserError(f"'{handle.name}' reads {config.max_position_embeddings} tokens: set `length` to that or less")


def with_classifier(module: nn.Module, head: nn.Linear, names: Sequence[str] | None = None) -> nn.Module:
    """The encoder of `module` and a linear head as one network that AutoModelForSequenceClassification loads.

    names: of the classes, for config.json.
    """
    from transformers import AutoModelForSequenceClassification

    encoder = encoder_of(module)
    names = list(names) if names is not None else [str(i) for i in range(head.out_features)]
    config = copy.deepcopy(_sizes(encoder))
    config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    with torch.random.fork_rng():  # its random weights are thrown away
        whole = AutoModelForSequenceClassification.from_config(config)
    whole.base_model.load_state_dict(encoder.state_dict())
    whole.classifier.load_state_dict(head.state_dict())
    return whole.eval().requires_grad_(False)


def carry_tokenizer(module: nn.Module, tokenizer: Words) -> nn.Module:
    """The same network; `TEXT_ENCODER.save` will write the tokenizer beside it, without which its numbers mean nothing."""
    setattr(module, CARRIED, tokenizer)
    return module


@contextmanager
def _projections(encoder: nn.Module, layers: Sequence[int]) -> Iterator[dict[tuple[int, str], Tensor]]:
    """Within the block, the outputs of the query and key projections of blocks `layers` (1..depth) are kept."""
    caught: dict[tuple[int, str], Tensor] = {}

    def keep(layer: int, name: str) -> Any:
        return lambda _module, _args, output: caught.__setitem__((layer, name), output)

    hooks = []
    for layer, name in itertools.product(layers, ("query", "key")):
        projection = encoder.get_submodule(f"encoder.layer.{layer - 1}.attention.self.{name}")
        hooks.append(projection.register_forward_hook(keep(layer, name)))
    try:
        yield caught
    finally:
        for hook in hooks:
            hook.remove()


def _scores(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """[rows, length, heads d_h] twice -> [rows, heads, length, length] in float32."""
    query, key = (x.float().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key))
    return query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5


def _sizes(module: nn.Module) -> Any:
    return module.config


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"'{folder}' has no config.json: give a folder saved by transformers or by fewstep")
    try:
        return json.loads(file.read_text())
    except ValueError:
        raise UserError(f"'{file}' is no JSON: the folder is damaged, save the model anew") from None
